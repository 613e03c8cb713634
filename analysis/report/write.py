"""Write the report of runs: Markdown, one self-contained HTML file, figures, and report.json, which `verify` checks.

Every number comes from the runs' frames. Each group of comparable rows (`runs.GROUP`: equal run, machine, model,
extractor, picture count, precision, ...) has its own tables and frontier.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dyndit import bounds, manifest, sealed_csv, seals
from dyndit.analysis.report import figures, page, plan_figures, strips, style
from dyndit.analysis.report.cells import as_markdown
from dyndit.analysis.report.claim_tables import HOW
from dyndit.analysis.report.contents import (
    Content,
    answer,
    answer_record,
    contents_of,
    lead_of,
    overview,
    table_record,
)
from dyndit.analysis.report.findings import read_plan, same_plans
from dyndit.analysis.report.guidance import guidance_figure, sweep_of
from dyndit.analysis.report.runs import GROUP, is_sealed, read_runs, runs_file, scored_rows
from dyndit.files import sha256, sweep, write_json, write_text
from dyndit.markdown import plain
from dyndit.training import exit_errors

REPORT = "report.json"

# Figures that a run may contain, in the order shown. This module draws the others (DRAWN).
CAPTIONS = {
    "plan.png": "Depth over the sampling steps, both guidance branches.",
    "samples.png": "The same seeds side by side: a column per seed, a row per arm.",
    "frames.png": "All frames of the first clips, the same seeds in every row: a row per arm.",
    "trainings.png": "Loss and Fréchet distance over compute, and over sampling time. Bars: 95%, over training seeds.",
    "errors.png": "Error of each exit against the full model, per band of log-SNR.",
}
REPLACED = {"plan.png": "plan-map", "errors.png": "exit-errors"}
"""Figures of a run that show what a figure of this module shows better. They are left out beside it."""
DRAWN = {
    "headline": "Quality over time: full depth, plans, and the three strongest kinds of rivals. Bars: 95% intervals.",
    "frontier": "Quality over time. Bars are 95% intervals of each arm by itself; the arms share their seeds, so the "
    "paired differences in the tables are known better than the bars suggest.",
    "predicted": "Predicted against measured; on the grey line the additive prediction is exact.",
    "plan-map": "Blocks run at each sampling step, a row per plan.",
    "exit-errors": "Error of each exit against the full model, layer over timestep.",
    "guidance": "Quality over the guidance scale, a line per way to guide. Bars are 95% intervals over seed blocks.",
    "time": "Time per picture, in the denoiser and elsewhere.",
    "side-by-side": "The same seeds side by side: a column per seed, a row per set of pictures.",
    "spread": "The Fréchet distance of every arm in every {unit}.",
}
"""Captions. {unit}: what the rows of an arm are, `Content.unit`."""


@dataclass(frozen=True)
class Picture:
    """A figure of the report, already on disk as PNG."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Pages:
    """The report as readers see it: a section per group, its pictures, and the runs' manifests as flat text."""

    title: str
    margin: float
    out: Path
    contents: list[Content]
    pictures: list[list[Picture]]
    manifests: dict[str, dict[str, str]]

    def how_to_read(self) -> str:
        """Return the note below the answer."""
        if all(content.claim for content in self.contents):
            return HOW
        return (
            "Lower FD is better; it compares only with figures of the same extractor, reference and number of "
            "pictures. Times run from noise to uint8, medians over the seed blocks. Quality is unchanged (yes) where "
            "the upper 95% bound of the paired difference to full depth at the same steps is at most "
            f"{self.margin:.0%} of full depth's FD; no: its lower bound is above that; not shown: neither is certain, "
            "draw more. At equal FD and at equal time full depth is interpolated between its step counts in log time, "
            "with the same solver; ≥ stands where full depth gets that good in no time that was measured. Intervals "
            "are 95%, over seed blocks that all arms share; a dash: not applicable, or outside the measured range."
        )

    @property
    def lead(self) -> int:
        """Return the group whose figure and heading stand on the first screen."""
        return lead_of(self.contents)

    @property
    def heading(self) -> str:
        """Return the heading of the first screen."""
        return self.contents[self.lead].glance.heading

    def markdown(self) -> str:
        """Return report.md; its pictures are links."""
        sentences, glance = answer(self.contents, self.margin)
        parts = [f"# {plain(self.title)}", f"## {self.heading}"]
        for sentence, detail in sentences:
            parts += [f"**{plain(sentence)}**", *([f"- {plain(detail)}"] if detail else [])]
        parts += [as_markdown(glance).rstrip(), glance.caption] if glance.rows else []
        parts += [*self._shown(self.pictures[self.lead][0]), self.how_to_read()]
        table = overview(self.contents)
        parts += ["## Runs", table.caption, as_markdown(table).rstrip()]
        for content, drawn in zip(self.contents, self._further(), strict=True):
            parts.append(f"## {plain(content.title)}")
            if content.findings:
                parts.append("\n".join(f"- {plain(finding)}" for finding in content.findings))
            for table in content.tables:
                parts += [f"### {table.name.capitalize()}", table.caption, as_markdown(table).rstrip()]
            for picture in drawn:
                parts += self._shown(picture)
        for name, facts in self.manifests.items():
            lines = [f"| {plain(key)} | {plain(value)} |" for key, value in facts.items()]
            parts.append("\n".join([f"## Manifest of {plain(name)}\n", "| | |", "|---|---|", *lines]))
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Return report.html; its pictures are embedded."""
        sentences, glance = answer(self.contents, self.margin)
        body = [page.heading(self.heading), *(page.lead(*both) for both in sentences)]
        body += [page.sortable(glance, headed=False, caption_first=False)] if glance.rows else []
        first = self.pictures[self.lead][0]
        body += [page.figure(first.path.read_bytes(), first.caption, kind="first"), page.note(self.how_to_read())]
        body += [page.heading("Runs"), page.sortable(overview(self.contents), headed=False)]
        for content, drawn in zip(self.contents, self._further(), strict=True):
            body += [page.heading(content.title), page.bullets(content.findings)]
            shown = [page.figure(picture.path.read_bytes(), picture.caption) for picture in drawn]
            before = int(bool(drawn) and drawn[0].caption == DRAWN["frontier"])
            body += [*shown[:before], *map(page.sortable, content.tables), *shown[before:]]
        body += [page.folded(f"Manifest of {name}", facts) for name, facts in self.manifests.items()]
        return page.page(self.title, body)

    def _further(self) -> list[list[Picture]]:
        """Return the pictures of each group without the one on the first screen."""
        return [drawn[1:] if k == self.lead else drawn for k, drawn in enumerate(self.pictures)]

    def _shown(self, picture: Picture) -> list[str]:
        link = _link(picture.path, self.out).replace(" ", "%20")
        return [f"![{picture.caption}]({link})", picture.caption]


@bounds.checked
def write_report(
    run_dirs: Path | Sequence[Path], out: Path, title: str = "Dynamic depth: quality and time", margin: float = 0.05
) -> Path:
    """Write report.md, report.html, report.json and the figures (PNG, SVG) into `out`; return report.html's path.

    run_dirs: runs files, or folders with runs.csv (or runs.parquet). Optional in a folder: manifest.json, plans,
    exit-errors.csv and the figures of CAPTIONS. margin: largest difference of unchanged quality, see
    `dyndit.stats.non_inferior`. report.html needs no other file and no network. Each figure has a
    <figure>.manifest.json beside it. Raises InputError: runs are missing or damaged, or manifest.json is unreadable.
    """
    paths = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(path) for path in run_dirs]
    contents = contents_of(paths, margin)
    manifests = {}
    for folder in dict.fromkeys(runs_file(path).parent for path in paths):
        if (file := folder / "manifest.json").is_file() and (facts := manifest.read(file)):
            facts = dict(_flat("", facts)) | ({} if manifest.is_sealed(facts) else {seals.SEAL: "none: not checked"})
            manifests[folder.name if folder.name not in manifests else str(folder)] = facts
    out, made = Path(out), manifest.describe({"margin": margin})
    sweep(out)
    suffixes = [""] if len(contents) == 1 else [f"-{k + 1}" for k in range(len(contents))]
    pictures = [_pictures(content, out, suffix, made) for content, suffix in zip(contents, suffixes, strict=True)]
    pictures[0] += _sweeps(contents, out, made)
    pages = Pages(title, margin, out, contents, pictures, manifests)
    write_text(out / "report.md", pages.markdown())
    write_text(out / "report.html", pages.html())
    write_json(out / REPORT, seals.sealed(_record(pages, list(map(runs_file, paths))) | made))
    return out / "report.html"


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _pictures(content: Content, out: Path, suffix: str, made: Mapping[str, object]) -> list[Picture]:
    """Draw the group's figures into `out`, each with its manifest, and add the run's own figures."""
    found = []
    source = {
        "group": {name: str(content.rows[name].iloc[0]) for name in GROUP},
        "lines of the runs file": [int(k) + 2 for k in content.rows.index],  # the heading is line 1
    }
    if content.claim:  # rows of several files, joined
        source = {
            "calibrations": sorted(map(int, set(content.rows["block"]))),
            "extractor": content.rows["extractor"].iloc[0],
        }
    figures_drawn = _drawn(content)
    for name, drawn in figures_drawn.items():
        files = [out / f"{name}{suffix}.png", out / f"{name}{suffix}.svg"]
        for file in files:
            style.save(drawn, file)
        facts = source | {"figure": name, "files": {file.name: sha256(file) for file in files}}
        facts |= _of_errors(content, out) if name == "exit-errors" else {}
        _write_manifest(out / f"{name}{suffix}.manifest.json", content, facts, made)
        found.append(Picture(files[0], DRAWN[name].format(unit=content.unit)))
    for name, caption in CAPTIONS.items() if content.first_of_run else ():
        file = content.source.parent / name
        if file.is_file() and REPLACED.get(name) not in figures_drawn:
            facts = {
                "figure": name,
                "files": {_link(file, out): sha256(file)},
                "drawn by": "the run, see its manifest.json",
            }
            _write_manifest(out / f"{file.stem}{suffix}.manifest.json", content, facts, made)
            found.append(Picture(file, caption))
    return found


def _sweeps(contents: Sequence[Content], out: Path, made: Mapping[str, object]) -> list[Picture]:
    """Draw the guidance sweep of each source that has one. Its rows are in several groups, one per scale."""
    found = []
    contents = [content for content in contents if not content.claim]
    for k, source in enumerate(dict.fromkeys(content.source for content in contents)):
        mine = [content for content in contents if content.source == source]
        sweep = sweep_of(pd.concat([scored_rows(content.rows) for content in mine]))
        if len(sweep):
            name = "guidance" if k == 0 else f"guidance-{k + 1}"
            files = [out / f"{name}.png", out / f"{name}.svg"]
            drawn = guidance_figure(sweep)
            for file in files:
                style.save(drawn, file)
            lines = [int(row) + 2 for row in sweep.index]  # the heading is line 1
            facts = {"figure": "guidance", "lines of the runs file": lines}
            facts |= {"files": {file.name: sha256(file) for file in files}}
            _write_manifest(out / f"{name}.manifest.json", mine[0], facts, made)
            found.append(Picture(files[0], DRAWN["guidance"]))
    return found


def _drawn(content: Content) -> dict[str, Figure]:
    """Draw the figures that the rows, plans and exit errors of a group allow."""
    scored, folder = scored_rows(content.rows), content.source.parent
    drawn = {"headline": few} if (few := figures.headline_figure(scored)) is not None else {}
    drawn["frontier"] = figures.frontier_figure(scored)
    if scored.groupby("arm")["predicted_fd"].first().notna().sum() > 1:
        drawn["predicted"] = figures.predicted_figure(scored)
    plans = {_joined(names): names[0] for names in same_plans(folder, scored)}
    files = scored.drop_duplicates("arm").set_index("arm")["plan"]
    if content.first_of_arms and plans:
        plans = {name: read_plan(folder, files[arm]) for name, arm in plans.items()}
        drawn["plan-map"] = plan_figures.plan_map_figure(plans)
    if content.first_of_run and (errors := folder / exit_errors.FILE).is_file():
        drawn["exit-errors"] = _errors_figure(errors)
    if content.first_of_arms and (times := figures.time_figure(scored)) is not None:
        drawn["time"] = times
    if content.first_of_run and len(rows := strips.shared(folder, scored)) > 1:
        drawn["side-by-side"] = figures.samples_figure(rows)
    return drawn | {"spread": figures.spread_figure(scored, content.unit)}


def _joined(names: Sequence[str]) -> str:
    """Join the names of arms that are one plan: `searched-ddim-10-b0.65 = b0.75`."""
    start = names[0].rpartition("-")[0] + "-"
    return " = ".join([names[0], *(name.removeprefix(start) for name in names[1:])])


def _errors_figure(path: Path) -> Figure:
    """Draw layer over timestep, from `training.exit_errors.exit_error_table` (equal bands of timesteps 0 to 999)."""
    errors = sealed_csv.read(path, ("depth", "band", "noise_error"))
    num_bands = int(errors["band"].max()) + 1
    table = errors.pivot(index="depth", columns="band", values="noise_error").sort_index(axis=1, ascending=False)
    table.columns = [f"{1000 * band // num_bands}–{1000 * (band + 1) // num_bands - 1}" for band in table.columns]
    return figures.error_figure(table, "mean squared error on the noise", "timestep, noise to picture")


def _of_errors(content: Content, out: Path) -> dict[str, object]:
    """Return the entry of the figure's manifest about the file of the exit errors."""
    path = content.source.parent / exit_errors.FILE
    checksum = "fits" if sealed_csv.check(path) else "none: not checked"
    return {"exit errors": {"file": _link(path, out), "sha256": sha256(path), seals.SEAL: checksum}}


def _write_manifest(path: Path, content: Content, facts: Mapping[str, object], made: Mapping[str, object]) -> None:
    source = {"runs": _link(content.source, path.parent), "sha256 of the runs": sha256(content.source)}
    if content.claim:
        source = {"runs": {_link(file, path.parent): sha256(file) for file in content.claim}}
    write_json(path, seals.sealed({**facts, **source, **made}))


def _record(pages: Pages, files: Sequence[Path]) -> dict[str, object]:
    """Return the contents of report.json: every printed number, its derivation, and its source files."""
    sources = [{"runs": _link(file, pages.out), "sha256": sha256(file), "rows": len(read_runs(file))} for file in files]
    for source, file in zip(sources, files, strict=True):
        source["checksum"] = "fits" if is_sealed(file) else "none: not checked"
    sections = [
        {"title": content.title, "findings": content.findings, "tables": list(map(table_record, content.tables))}
        for content in pages.contents
    ]
    of_all = {"title": pages.title, "margin": pages.margin, "sources": sources}
    of_all["answer"] = answer_record(pages.contents, pages.margin)
    return of_all | {"overview": table_record(overview(pages.contents)), "sections": sections}


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Flatten nested JSON into dotted names and text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list):
        text = " ".join(map(str, value))
        yield name, text if len(text) <= 200 else f"{len(value)} entries"
    else:
        yield name, str(value)
