"""Publish the runs of the whole family, and write docs/family.md from what is published.

    python docs/scripts/family.py runs/family    # copy what ran there to docs/results/family, then write the page
    python docs/scripts/family.py                # write the page alone

docs/scripts/family.md is the page's text. A mark such as `<!-- plans flow -->` becomes what the published rows of the
run "flow" say, or its command and "not yet measured".
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from dyndit import files, manifest, sealed_csv
from dyndit.analysis import read_runs, summary, write_report
from dyndit.analysis.report.guidance import lines_of, sweep_of
from dyndit.analysis.report.runs import scored_rows
from dyndit.analysis.report.tables import percent
from dyndit.stats import Interval, paired_interval

DOCS = Path(__file__).resolve().parents[1]
FOLDER, PAGE, TEXT = DOCS / "results" / "family", DOCS / "family.md", Path(__file__).with_suffix(".md")
MARK = re.compile(r"<!-- (\w+)(?: ([\w-]+))? -->")
SOURCES = (
    "runs.csv",
    "trainings.csv",
    "manifest.json",
    "exit-errors.csv",
    "trainings.png",
    "samples.png",
    "frames.png",
)
"""What a published run holds, besides its plans."""
MAIN_STEPS = 10
"""Steps at which the overview compares plans with full depth."""
UNMEASURED = "not yet measured"

STUDY = "python -m dyndit.recipes.studies"
CONDITIONINGS = {"adaln-zero": "adaLN-Zero", "adaln": "adaLN", "cross-attention": "cross-attention"}
CONDITIONINGS |= {"in-context": "in-context"}
"""Their names, in the published order of quality."""
COMMANDS = {
    "conditioning-digits": f"{STUDY}.conditioning digits runs/family/conditioning-digits",
    "conditioning-cifar10": f"{STUDY}.conditioning cifar10 runs/family/conditioning-cifar10 DIR",
    **{
        f"exits-{name}": "dyndit compare conditioning_exits --model "
        f"runs/family/conditioning-digits/models/{name}-s0 --out runs/family/exits-{name}"
        for name in CONDITIONINGS
    },
    "ladder-sizes": f"{STUDY}.ladder sizes runs/family/ladder-sizes",
    "ladder-patches": f"{STUDY}.ladder patches runs/family/ladder-patches",
    "guidance": "dyndit compare digits_guidance --out runs/family/guidance",
    "ddpm": "dyndit compare digits_flow --from-scratch --out runs/family/ddpm",
    "flow": "dyndit quickstart --family flow --out runs/family/flow",
    "mmdit": "dyndit quickstart --family mmdit --out runs/family/mmdit",
    "video": "dyndit quickstart --family video --out runs/family/video",
}
JOINT = {"processes": ("ddpm", "flow")}
"""Reports over several runs."""
ALIKE = {
    **dict.fromkeys(("conditioning-digits", "conditioning-cifar10"), CONDITIONINGS),
    "ladder-sizes": {name: name for name in ("large", "medium", "small", "tiny")},
    "ladder-patches": {f"patch {p}": f"patch {p}" for p in (2, 1, 4)},
}
"""Backbones of each study by their labels; the first is what the others are compared with."""
VARIANTS = (
    *((f"DiT, {label}", f"exits-{name}", "conditioning-digits", name) for name, label in CONDITIONINGS.items()),
    ("DiT, DDPM", "ddpm", "ddpm", "backbone"),
    ("DiT, rectified flow", "flow", "flow", "backbone"),
    ("MM-DiT", "mmdit", "mmdit", "backbone"),
    ("video DiT", "video", "video", "backbone"),
)
"""Every variant with exits: its label, its run, the run of its training and its name there."""


def publish(runs: Path, folder: Path = FOLDER) -> None:
    """Copy what each run in `runs` rests on to `folder`, with its plans, and report it there."""
    for name in COMMANDS:
        source, target = runs / name, folder / name
        if not (source / "runs.csv").is_file():
            continue
        files.remove(target)
        plans = [(path, target / "plans" / path.name) for path in source.glob("plan-*.json")]
        for path, copy in [*((source / part, target / part) for part in SOURCES), *plans]:
            if path.is_file():
                files.copy(path, copy)
        _report([target], target, f"The family: {name}")
    for name, parts in JOINT.items():
        if all((folder / part).is_dir() for part in parts):
            files.remove(folder / name)
            _report([folder / part for part in parts], folder / name, f"The family: {' and '.join(parts)}")


def _report(runs: Sequence[Path], out: Path, title: str) -> None:
    """Write the report, without files that repeat others."""
    write_report(runs, out, title=title)
    for path in (*out.glob("*.svg"), out / "report.html"):
        files.remove(path)


@dataclass(frozen=True)
class Run:
    """A published run."""

    name: str
    folder: Path

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Return the scored rows of the extractor that plans are calibrated on."""
        rows = scored_rows(read_runs(self.folder))
        return rows[rows["extractor"] == rows["extractor"].iloc[0]]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Return a row per arm, see `frontier.summary`."""
        return summary(self.rows)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Return the rows of trainings.csv; an empty table without the file."""
        path = self.folder / "trainings.csv"
        needed = ("name", "seconds")
        return sealed_csv.read(path, needed) if path.is_file() else pd.DataFrame(columns=["name", "seed", "seconds"])

    @property
    def seconds(self) -> dict[str, float]:
        """Return the time of each part of a comparison: backbone, exits, table, and drawing the scored pictures."""
        drawn = (self.rows["ms_per_picture"] * self.rows["num_images"]).sum() / 1e3
        return dict(zip(self.costs["name"], self.costs["seconds"], strict=True)) | {"drawing": drawn}

    @property
    def metric(self) -> str:
        """Return what the Fréchet distance is called."""
        return self.rows["metric"].iloc[0]

    @property
    def source(self) -> str:
        """Return the lines that say where the figures come from."""
        facts = manifest.read(self.folder / "manifest.json")
        made = f"{facts['machine']}, {facts['date'][:10]}, revision {facts['revision'] or 'unknown'}."
        report = f"results/family/{self.name}/report.md"
        return f"    {COMMANDS[self.name]}\n\n{made} Rows, every table and the manifest: [{self.name}]({report})."

    def figure(self, file: str, caption: str) -> Iterator[str]:
        """Return the lines of a figure, if the run has it."""
        if (self.folder / file).is_file():
            yield f"![{caption}](results/family/{self.name}/{file})"
            yield f"*{caption}*"


@dataclass(frozen=True)
class Family:
    """The page's parts, each a method that a mark names, from the runs published in a folder."""

    folder: Path = FOLDER

    def page(self) -> str:
        """Return the text of docs/family.md."""
        return re.sub(r"\n{3,}", "\n\n", MARK.sub(self._filled, TEXT.read_text(encoding="utf-8")))

    def _filled(self, mark: re.Match) -> str:
        part, name = mark.groups()
        if name is None:
            return "\n\n".join(getattr(self, part)())
        if (run := self.run(name)) is None:
            return f"    {COMMANDS[name]}\n\n{UNMEASURED.capitalize()}." if part != "order" else ""
        return "\n\n".join(getattr(self, part)(run))

    def run(self, name: str) -> Run | None:
        """Return a run, if it is published."""
        return Run(name, self.folder / name) if (self.folder / name / "runs.csv").is_file() else None

    def overview(self) -> Iterator[str]:
        """Set every variant's cost, and its dynamic frontier beside its full-depth one, in one row."""
        rows = []
        for label, name, training, key in VARIANTS:
            run, trained = self.run(name), self.run(training)
            cells = [label, *(["–"] * 4 if trained is None else cost(trained, key))]
            if run is None:
                rows.append([*cells, "–", UNMEASURED, *["–"] * (len(BESIDE) - 1)])
                continue
            besides = run.costs.loc[run.costs["name"] != "backbone", "seconds"].sum()
            rows.append([*cells, minutes(besides), *beside(run, MAIN_STEPS)])
        yield table(["variant", *COST, "exits and table, min", *BESIDE], rows)

    def trainings(self, run: Run) -> Iterator[str]:
        """Show backbones that were trained alike, with differences to the first paired by training seed."""
        names, fd = ALIKE[run.name], run.rows.pivot(index="block", columns="settings", values="fd")
        first, rows = next(iter(names)), []
        for name, label in names.items():
            costs = run.costs[run.costs["name"] == name]
            if name not in fd or costs.empty:
                rows.append([label, UNMEASURED, *["–"] * 9])
                continue
            ms = run.rows.loc[run.rows["settings"] == name, "ms_per_picture"].median()
            gap = signed(paired_interval(fd[name], fd[first])) if name != first and first in fd else "–"
            seen = [f"{costs['tokens'].iloc[0]:.0f}", f"{costs['pictures'].iloc[0]:,.0f}"]
            quality = [f"{paired_interval(costs['loss']):.4f}", str(paired_interval(fd[name])), gap]
            rows.append([label, *cost(run, name), *seen, *quality, number(ms)])
        columns = ["backbone", *COST, "tokens", "pictures seen", "loss", run.metric, f"less {names[first]}'s"]
        yield table([*columns, "ms a picture"], rows)
        yield from run.figure("trainings.png", "Loss and distance over training compute; distance over sampling time")
        yield run.source

    def order(self, run: Run) -> Iterator[str]:
        """Say if the published order of the conditionings is found."""
        fd = run.rows.pivot(index="block", columns="settings", values="fd").dropna()
        if set(fd) != set(CONDITIONINGS) or fd.empty:
            yield f"Which order holds is {UNMEASURED}: a conditioning is missing."
            return
        means, names = fd.mean().sort_values(), list(CONDITIONINGS)
        told = []
        for name in names[1:]:
            gap = paired_interval(fd[name], fd[names[0]])
            kind = ("worse" if gap.mean > 0 else "better") if gap.excludes(0) else "not told apart"
            told.append(f"{CONDITIONINGS[name]} {kind} ({signed(gap)})")
        found = ", ".join(f"{CONDITIONINGS[name]} {mean:.2f}" for name, mean in means.items())
        yield (
            f"Mean {run.metric}, best first: {found}. The published order is {', '.join(CONDITIONINGS.values())}: it "
            f"{'is' if list(means.index) == names else 'is not'} found here, and adaLN-Zero "
            f"{'is' if means.index[0] == names[0] else 'is not'} the best by its mean. "
            f"Against adaLN-Zero, paired over {len(fd)} training seeds: {'; '.join(told)}."
        )

    def plans(self, run: Run) -> Iterator[str]:
        """Show every plan of a run, losing ones too, beside full depth's own frontier."""
        plans = run.frame[run.frame["family"] == "searched"]
        columns = ["plan", "blocks run", "ms", run.metric, "time saved", "less full's, same steps"]
        rows = [
            [
                f"{row['steps']} steps, budget {row['budget']:g}",
                percent(row["share_of_blocks"]),
                number(row["ms"]),
                str(row["fd"]),
                percent(row["time_saved"]),
                signed(row["fd_diff"]) + (" \\*" if row["unchanged"] else ""),
                signed(row["fd_diff_equal_time"]),
                verdict(row),
            ]
            for _, row in plans.iterrows()
        ]
        yield table([*columns, "less full's, same time", "there"], rows)
        yield "\\* quality unchanged: the upper bound is at most 5% of full depth's distance."
        for solver, full in run.frame[run.frame["family"] == "full"].groupby("solver", sort=False):
            points = [[str(r["steps"]), number(r["ms"]), str(r["fd"])] for _, r in full.sort_values("ms").iterrows()]
            yield table([f"full depth, {solver}", *(steps for steps, *_ in points)], _turned(points, run.metric))
        yield from run.figure("frontier.png", "Full depth over steps, plans over budgets")
        yield from run.figure("samples.png", "The same seeds, a row per arm")
        yield from run.figure("frames.png", "All frames of the first clips, the same seeds in every row")
        yield f"Minutes: {', '.join(f'{part} {minutes(seconds)}' for part, seconds in run.seconds.items())}."
        yield run.source

    def guidance(self, run: Run) -> Iterator[str]:
        """Show the sweep of the guidance scale."""
        if (sweep := sweep_of(run.rows)).empty:
            yield f"The sweep is {UNMEASURED}: too few scales are done."
            return
        scales, rows, best = sorted(sweep["cfg_scale"].unique()), [], []
        for way, own in lines_of(sweep).items():
            found = {s: paired_interval(own.loc[own["cfg_scale"] == s].sort_values("block")["fd"]) for s in scales}
            rows.append([way, *map(str, found.values())])
            scale = min(scales, key=lambda s: found[s].mean)
            best.append(f"{way} {found[scale]} at {scale:g}")
        first = sweep.iloc[0]
        yield table([f"{run.metric} at scale", *(f"{scale:g}" for scale in scales)], rows)
        yield f"{first['solver']} at {first['steps']:g} steps; 1 is unguided. The best of each way: {'; '.join(best)}."
        yield from run.figure("guidance.png", "Quality over the guidance scale, a line per way to guide")
        yield run.source

    def processes(self) -> Iterator[str]:
        """Set both processes side by side, at every number of steps that plans were searched at."""
        rows, at = [], {}
        for name, label in (("ddpm", "DDPM, DDIM"), ("flow", "flow, Euler")):
            if (run := self.run(name)) is None:
                rows.append([label, "–", UNMEASURED, *["–"] * (len(BESIDE) - 1)])
                continue
            for steps in sorted(run.frame.loc[run.frame["family"] == "searched", "steps"].unique()):
                rows.append([label, str(steps), *beside(run, steps)])
                full = full_at(run.frame, steps)
                if full is not None:
                    at[name, steps] = run.rows[run.rows["arm"] == full["arm"]].set_index("block")["fd"].sort_index()
        yield table(["process, solver", "steps", *BESIDE], rows)
        both = [steps for name, steps in at if name == "ddpm" and ("flow", steps) in at]
        if both:
            gaps = [f"{signed(paired_interval(at['flow', s], at['ddpm', s]))} at {s} steps" for s in both]
            yield f"Full depth's distance under the flow, less DDPM's over the same seed blocks: {', '.join(gaps)}."
        if (self.folder / "processes" / "report.md").is_file():
            yield "Both in one report: [processes](results/family/processes/report.md)."


COST = ("parameters", "MMACs", "PFLOPs", "min")
BESIDE = ("full depth, ms", "distance", "plan, budget", "ms", "distance", "time saved", "quality kept", "at equal time")


def cost(run: Run, key: str) -> list[str]:
    """Return the cells of a training: parameters, multiply-accumulates of a pass, arithmetic, median time."""
    costs = run.costs[run.costs["name"] == key]
    if costs.empty:
        return ["–"] * len(COST)
    first, scales = costs.iloc[0], {"parameters": 1e6, "macs": 1e6, "training_flops": 1e15}
    size, *work = (number(first[name] / scale) for name, scale in scales.items())
    return [f"{size} M", *work, minutes(costs["seconds"].median())]


def beside(run: Run, steps: int) -> list[str]:
    """Return the cells of full depth and of the chosen plan at the same steps."""
    full, plan = full_at(run.frame, steps), chosen(run.frame, steps)
    if full is None or plan is None:
        return [UNMEASURED, *["–"] * (len(BESIDE) - 1)]
    cells = [number(full["ms"]), str(full["fd"]), f"{plan['budget']:g}", number(plan["ms"]), str(plan["fd"])]
    return [*cells, percent(plan["time_saved"]), "yes" if plan["unchanged"] else "no", verdict(plan)]


def chosen(frame: pd.DataFrame, steps: int) -> pd.Series | None:
    """Return the plan that saves most time at unchanged quality; if none does, the plan of the lowest distance."""
    plans = frame[(frame["family"] == "searched") & (frame["steps"] == steps)]
    if plans.empty:
        return None
    kept = plans[plans["unchanged"].map(bool)]
    return kept.loc[kept["time_saved"].idxmax()] if len(kept) else plans.loc[plans["fd"].map(mean_of).idxmin()]


def full_at(frame: pd.DataFrame, steps: int) -> pd.Series | None:
    """Return full depth at these steps, with the solver of the plans."""
    solver = frame.loc[frame["family"] == "searched", "solver"].head(1)
    found = frame[(frame["family"] == "full") & (frame["steps"] == steps) & frame["solver"].isin(solver)]
    return None if found.empty else found.iloc[0]


def verdict(row: pd.Series) -> str:
    """Say how a plan stands against full depth that takes the same time with fewer steps."""
    if math.isnan(mean_of(row["fd_diff_equal_time"])):
        return "not comparable"
    return "better" if row["better"] else "worse" if row["worse"] else "level"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; the first column holds text."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _turned(points: Sequence[Sequence[str]], metric: str) -> list[list[str]]:
    """Return a row of times and a row of distances.  points: (steps, ms, FD) of every arm."""
    return [["ms", *(ms for _, ms, _ in points)], [metric, *(fd for *_, fd in points)]]


def mean_of(value: Interval) -> float:
    """Return an interval's mean."""
    return value.mean


def number(value: float) -> str:
    """Write three digits, or all digits before the point; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def minutes(seconds: float) -> str:
    """Write seconds as minutes."""
    return "–" if math.isnan(seconds) or not seconds else f"{seconds / 60:.1f}"


def signed(value: Interval) -> str:
    """Write a difference with its sign; a dash for NaN."""
    return f"{value:+.2f}"


def main(runs: Path | None = None) -> None:
    """Publish the runs, if a folder is named, and write the page."""
    if runs is not None:
        publish(runs)
    files.write_text(PAGE, Family().page())
    print(f"{PAGE.name}: {PAGE.read_text(encoding='utf-8').lower().count(UNMEASURED)} times {UNMEASURED}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
