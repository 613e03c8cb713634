"""The report of a run: tables and figures as Markdown, as one self-contained HTML file, and for the terminal.

Every number comes from the runs' frame. Machines, models, extractors and picture counts are kept apart:
each such group has its own table and its own frontier.
"""

import base64
import html
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from dyndit.analysis.figures import frontier_figure, predicted_figure, save
from dyndit.analysis.frontier import GROUP, against_controls, against_unguided, read_runs, summary
from dyndit.analysis.intervals import Interval
from dyndit.errors import InputError

# Figures that a run may have left, in the order shown; frontier and predicted are drawn here.
CAPTIONS = {
    "plan.png": "Depth over the sampling steps, both guidance branches.",
    "samples.png": "The same seeds, a row per arm.",
    "errors.png": "Error of each exit against the full model, per band of log-SNR.",
}
FRONTIER_CAPTION = (
    "Quality over time. Bars are 95% intervals of each arm by itself; the arms share their seeds, so the "
    "paired differences in the table are known better than the bars suggest."
)
PREDICTED_CAPTION = "Predicted against measured; on the grey line the additive prediction is exact."


@dataclass(frozen=True)
class Column:
    """A column of the tables. `show` gives the text of a row, `rank` the number it sorts by."""

    title: str
    show: Callable[[pd.Series], str]
    rank: Callable[[pd.Series], float | str]


def _number(value: float) -> str:
    """Three digits, or all before the point; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _percent(value: float | Interval) -> str:
    """A share as percent, `38%` or `38 ± 2%`."""
    if isinstance(value, Interval):
        if math.isnan(value.mean) or math.isnan(value.low):
            return _percent(value.mean)
        return f"{100 * value.mean:.0f} ± {100 * value.half:.0f}%"
    return "–" if math.isnan(value) else f"{value:.0%}"


def _saved_at_equal_fd(row: pd.Series) -> str:
    """The saving with its interval; "≥ 70%" where full depth never gets as good as this in its measured range."""
    if math.isnan(row["time_saved_at_least"]):
        return _percent(row["time_saved_equal_fd"])
    return f"≥ {row['time_saved_at_least']:.0%}"


def _verdict(value: bool | None) -> str:
    return {None: "–", True: "yes", False: "no"}[value]


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns of the tables; the first eight are the terminal's."""
    metric = frame["metric"].iloc[0] if len(frame) and frame["metric"].nunique() == 1 else "FD"
    return [
        Column("arm", lambda r: r["arm"], lambda r: r["arm"]),
        Column("solver", lambda r: r["solver"], lambda r: r["solver"]),
        Column("steps", lambda r: str(r["steps"]), lambda r: r["steps"]),
        Column("share of blocks", lambda r: _percent(r["share_of_blocks"]), lambda r: r["share_of_blocks"]),
        Column("ms per picture", lambda r: _number(r["ms"]), lambda r: r["ms"]),
        Column(f"{metric} ± 95%", lambda r: str(r["fd"]), lambda r: r["fd"].mean),
        Column("time saved vs full depth", lambda r: _percent(r["time_saved"]), lambda r: r["time_saved"]),
        Column(
            "time saved at equal FD",
            _saved_at_equal_fd,
            lambda r: r["time_saved_equal_fd"].mean,
        ),
        Column("FD − full depth, same steps", lambda r: f"{r['fd_diff']:+.2f}", lambda r: r["fd_diff"].mean),
        Column("quality unchanged", lambda r: _verdict(r["unchanged"]), lambda r: _verdict(r["unchanged"])),
        Column(
            "FD − full depth, same time",
            lambda r: f"{r['fd_diff_equal_time']:+.2f}",
            lambda r: r["fd_diff_equal_time"].mean,
        ),
        Column("note", lambda r: r["note"], lambda r: r["note"]),
    ]


NUM_TERMINAL, METRIC = 8, 5
# On 80 columns every heading but the arm's has to break where the figures below it are narrow.
HEADINGS = {
    "share of blocks": "share of\nblocks",
    "ms per picture": "ms per\npicture",
    "time saved vs full depth": "saved\nvs full",
    "time saved at equal FD": "saved at\nequal FD",
}


def _rows(frame: pd.DataFrame) -> Iterator[pd.Series]:
    return (row for _, row in frame.iterrows())


def terminal_table(frame: pd.DataFrame) -> Table:
    """The result of `frontier.summary` -> the table that ends a run on the terminal."""
    columns = _columns(frame)[:NUM_TERMINAL]
    metric = columns[METRIC].title.removesuffix(" ± 95%")
    title = None if metric == "FD" else f"FD is {metric}"
    table = Table(title=title, header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        text = column.title in ("arm", "solver")
        heading = HEADINGS.get(column.title, "FD\n± 95%" if column.title.endswith("± 95%") else column.title)
        # Where the terminal is narrow the arm's name folds; figures never do.
        table.add_column(heading, justify="left" if text else "right", no_wrap=column.title != "arm", overflow="fold")
    for row in _rows(frame):
        # Solver and steps have columns of their own here.
        short = row["arm"].replace(f"-{row['solver']}-{row['steps']}", "")
        table.add_row(
            short, *(column.show(row) for column in columns[1:]), style="dim" if row["family"] == "full" else ""
        )
    return table


def markdown_table(frame: pd.DataFrame) -> str:
    """The result of `frontier.summary` -> a Markdown table, with the verdicts and notes."""
    columns = _columns(frame)
    if not (frame["note"] != "").any():
        del columns[-1]
    lines = [[column.title for column in columns]]
    lines += [["---" if column.title in ("arm", "solver", "note") else "---:" for column in columns]]
    lines += [[column.show(row).replace("|", "\\|") for column in columns] for row in _rows(frame)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def headlines(frame: pd.DataFrame, margin: float = 0.05) -> list[str]:
    """The result of `frontier.summary` for one group -> its findings, a sentence each."""
    dynamic = frame[~frame["family"].isin(["full", "unguided"])]
    found = []
    for (solver, steps), arms in dynamic[dynamic["family"] == "searched"].groupby(["solver", "steps"], sort=False):
        known = arms[arms["unchanged"].notna()]
        kept = known[known["unchanged"].astype(bool)]
        if known.empty:
            continue
        if kept.empty:
            found.append(f"{solver}, {steps} steps: none of {len(known)} plans keeps full depth's quality.")
            continue
        best = kept.sort_values("time_saved", ascending=False).iloc[0]
        found.append(
            f"{solver}, {steps} steps: largest time saving at unchanged quality "
            f"{_percent(best['time_saved'])}, at {_percent(best['share_of_blocks'])} of the blocks "
            f"({best['arm']}; FD difference {best['fd_diff']:+.2f}, upper bound at most {margin:.0%} of full "
            f"depth's FD); {len(kept)} of {len(known)} plans keep it; chosen among them on these very blocks."
        )
    for (solver, family), arms in dynamic.groupby(["solver", "family"], sort=False):
        compared = arms[[not math.isnan(d.mean) for d in arms["fd_diff_equal_time"]]]
        if len(compared):
            plans = f"{len(compared)} {family} plan{'s' if len(compared) > 1 else ''}"
            found.append(
                f"{solver}, against full depth at equal time: of {plans} {compared['better'].sum()} better, "
                f"{compared['worse'].sum()} worse (95% interval excludes 0)."
            )
    return found


def frontier_findings(frame: pd.DataFrame, margin: float = 0.05) -> list[str]:
    """The result of `frontier.summary` for one group -> searched plans against the full-depth frontier.

    Counted are plans whose time lies between those of 5 and 20 full-depth steps of the same solver.
    """
    found = []
    for solver, arms in frame.groupby("solver", sort=False):
        full = arms[arms["family"] == "full"].set_index("steps")["ms"]
        if not {5, 20} <= set(full.index):
            continue
        plans = arms[(arms["family"] == "searched") & arms["ms"].between(full[5], full[20])]
        plans = plans[[not math.isnan(d.mean) for d in plans["fd_diff_equal_time"]]]
        above = sum(
            d.mean > margin * (fd.mean - d.mean) for d, fd in zip(plans["fd_diff_equal_time"], plans["fd"], strict=True)
        )
        found.append(
            f"{solver}, between the times of 5 and 20 full-depth steps: of {len(plans)} searched plans "
            f"{plans['better'].sum()} lie clearly below the full-depth frontier, {above} above it by more than "
            f"{margin:.0%}."
        )
    return found


def control_findings(runs: pd.DataFrame) -> list[str]:
    """Searched plans against constants, reversals and ramps of the same budget, a sentence per family."""
    found = []
    table = against_controls(runs)
    if table.empty:
        return found
    for (solver, steps, budget, family), rows in table.groupby(["solver", "steps", "budget", "family"], sort=False):
        best = rows.sort_values("fd_control").iloc[0]
        many = f"the best of {len(rows)} {family} plans, " if len(rows) > 1 else ""
        verdict = "better" if best["better"] else "worse" if best["worse"] else "neither better nor worse"
        found.append(
            f"{solver}, {int(steps)} steps, budget {budget:g}: the searched plan against {many}{best['control']}: FD "
            f"{best['fd_diff']:+.2f} ({verdict}), in {best['time_ratio']:.2f} of its time."
        )
    return found


def unguided_findings(runs: pd.DataFrame) -> list[str]:
    """Searched plans against full depth without guidance at equal time, a sentence per solver."""
    return [
        f"{solver}, against full depth without guidance at equal time: of {len(rows)} searched plans "
        f"{rows['better'].sum()} better, {rows['worse'].sum()} worse (95% interval excludes 0)."
        for solver, rows in against_unguided(runs).groupby("solver", sort=False)
    ]


def plan_findings(folder: Path, runs: pd.DataFrame) -> list[str]:
    """Mean conditional depth of the searched plans in the noisiest, middle and last third of their steps."""
    scored = runs[(runs["role"] == "score") & (runs["plan"].fillna("") != "")]
    found = []
    for (solver, steps), group in scored.groupby(["solver", "steps"], sort=False):
        files = [folder / name for name in group["plan"].unique() if (folder / name).is_file()]
        plans = [json.loads(path.read_text(encoding="utf-8"))["cond"] for path in files]
        if plans and steps >= 3:
            thirds = [np.mean([np.mean(part) for part in parts]) for parts in zip(*map(_thirds, plans), strict=True)]
            depths = ", ".join(f"{depth:.1f}" for depth in thirds)
            found.append(
                f"{solver}, {int(steps)} steps: mean conditional depth over {len(plans)} searched plans in the "
                f"noisiest, middle and last third of the steps: {depths}."
            )
    return found


def _thirds(depths: Sequence[int]) -> list[np.ndarray]:
    return np.array_split(np.asarray(depths), 3)


@dataclass(frozen=True)
class Picture:
    """A figure of the report, already on disk."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """One group of comparable arms."""

    title: str
    findings: list[str]
    frame: pd.DataFrame
    pictures: list[Picture]


def write_report(
    run_dirs: Path | Sequence[Path],
    out: Path,
    title: str = "Dynamic depth: quality and time",
    margin: float = 0.05,
) -> Path:
    """Write report.md, report.html and frontier*.png into `out`, and return the path of report.html.

    run_dirs: folders with runs.csv and, where there are any, manifest.json and the figures of CAPTIONS.
    margin: what counts as unchanged quality, see `intervals.non_inferior`. report.html needs no other file
    and no network. Raises InputError: runs.csv missing or damaged, manifest.json unreadable.
    """
    folders = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(d) for d in run_dirs]
    frames = [read_runs(folder) for folder in folders]
    manifests = {folder.name: m for folder in folders if (m := _read_manifest(folder / "manifest.json"))}
    parts = [
        (folder, group)
        for folder, runs in zip(folders, frames, strict=True)
        for _, group in runs.groupby(GROUP, sort=False)
    ]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for folder, runs in parts:
        if not (runs["role"] == "score").any():
            continue  # plans were searched, nothing was scored yet
        suffix = "" if len(parts) == 1 else f"-{len(sections) + 1}"
        sections.append(_section(folder, runs, out, suffix, margin))
    if not sections:
        raise InputError(f"{folders[0]}: no row of role 'score', expected at least one")
    _write(out / "report.md", _markdown(title, sections, manifests, out, margin))
    _write(out / "report.html", _html(title, sections, manifests, margin))
    return out / "report.html"


def _section(folder: Path, runs: pd.DataFrame, out: Path, suffix: str, margin: float) -> Section:
    """Summarise one group, and draw its figures into `out`."""
    first = runs[runs["role"] == "score"].iloc[0]
    frame = summary(runs, margin)
    pictures = [Picture(out / f"frontier{suffix}.png", FRONTIER_CAPTION)]
    save(frontier_figure(runs), pictures[0].path)
    if frame["predicted_fd"].notna().sum() > 1:
        pictures.append(Picture(out / f"predicted{suffix}.png", PREDICTED_CAPTION))
        save(predicted_figure(runs), pictures[1].path)
    pictures += [Picture(folder / name, text) for name, text in CAPTIONS.items() if (folder / name).is_file()]
    title = (
        f"{first['run']}: {first['model']} on {first['machine']}, {first['metric']}, "
        f"CFG {first['cfg_scale']:g}, {frame['blocks'].max()} seed blocks of {first['num_images']:g} pictures"
    )
    findings = headlines(frame, margin) + frontier_findings(frame, margin)
    findings += unguided_findings(runs) + control_findings(runs) + plan_findings(folder, runs)
    return Section(title, findings, frame, pictures)


def _read_manifest(path: Path) -> dict[str, str]:
    """Return the manifest as flat text, empty without one. Raises InputError."""
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error}), expected JSON") from error
    return dict(_flat("", manifest))


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Nested JSON -> dotted names and text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list):
        text = " ".join(map(str, value))
        yield name, text if len(text) <= 200 else f"{len(value)} entries"
    else:
        yield name, str(value)


def _how_to_read(margin: float) -> str:
    return (
        "Lower FD is better; it compares only with figures of the same extractor, reference and number of "
        "pictures. Times run from noise to uint8, medians over the seed blocks. Quality is unchanged where "
        "the upper 95% bound of the paired difference to full depth at the same steps is at most "
        f"{margin:.0%} of full depth's FD. At equal FD and at equal time full depth is interpolated between "
        "its step counts in log time, with the same solver; ≥ stands where full depth gets that good in no time that "
        "was measured. Intervals are 95%, over seed blocks that all arms share; a dash: not applicable, or outside "
        "the measured range."
    )


def _markdown(
    title: str, sections: list[Section], manifests: Mapping[str, Mapping[str, str]], out: Path, margin: float
) -> str:
    parts = [f"# {title}", _how_to_read(margin)]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.findings:
            parts.append("\n".join(f"- {finding}" for finding in section.findings))
        parts.append(markdown_table(section.frame).rstrip())
        for picture in section.pictures:
            link = Path(os.path.relpath(picture.path, out)).as_posix()
            parts.append(f"![{picture.caption}]({link.replace(' ', '%20')})")
            parts.append(picture.caption)
    for name, manifest in manifests.items():
        lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in manifest.items()]
        parts.append("\n".join([f"## Manifest of {name}\n", "| | |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


CSS = """
:root { --ink: #222; --faint: #6b6b6b; --line: #e2e2e2; --mark: #0072B2; } body { font: 15px/1.5 system-ui,
sans-serif; color: var(--ink); max-width: 1320px; margin: 2rem auto;
  padding: 0 1rem; } h1 { font-size:
1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } p { max-width: 50rem; }
p.note, figcaption, small { color: var(--faint); font-size: .87rem; } .wide { overflow-x: auto; } table {
border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; } th, td { padding: .28rem
.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; } th { border-bottom:
2px solid var(--ink); vertical-align: bottom; line-height: 1.25; } th.text, td.text { text-align: left; }
td.arm { white-space: nowrap; } td:not(.text) { white-space: nowrap; } td.remark { min-width: 13rem; color:
var(--faint); } tr.full td { color: var(--faint); } tbody tr:hover { background: #f5f8fb; } table.sort th {
cursor: pointer; user-select: none; } table.sort th:hover { color: var(--mark); }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193";
} figure { margin: 1.4rem 0; } figure img { max-width: 100%; height: auto; } details { margin-top: 1rem; }
td.value { word-break: break-word; white-space: normal !important; }
"""

JS = """
for (const table of document.querySelectorAll("table.sort")) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.v;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // empty cells last, either way
      const less = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -less : less;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }));
}
"""


def _html(title: str, sections: list[Section], manifests: Mapping[str, Mapping[str, str]], margin: float) -> str:
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{html.escape(_how_to_read(margin))}</p>']
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.findings:
            items = "".join(f"<li>{html.escape(finding)}</li>" for finding in section.findings)
            body.append(f"<ul>{items}</ul>")
        pictures = [_html_picture(picture) for picture in section.pictures]
        body += [pictures[0], _html_table(section.frame), *pictures[1:]]
    for name, manifest in manifests.items():
        cells = "</td><td class='text value'>"
        lines = [
            f"<tr><td class='text'>{html.escape(key)}{cells}{html.escape(value)}</td></tr>"
            for key, value in manifest.items()
        ]
        summary_line = f"<summary>Manifest of {html.escape(name)}</summary>"
        body.append(f"<details>{summary_line}<table><tbody>{''.join(lines)}</tbody></table></details>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{JS}</script>\n</body>\n</html>\n"
    )


def _html_table(frame: pd.DataFrame) -> str:
    """The result of `frontier.summary` -> a table that sorts on a click; `data-v` holds what it sorts by."""
    columns = _columns(frame)
    if not (frame["note"] != "").any():
        del columns[-1]
    classes = {"arm": "text arm", "solver": "text", "note": "text remark"}
    head = "".join(
        f'<th class="{classes.get(c.title, "")}" title="click to sort">{html.escape(c.title)}</th>' for c in columns
    )
    lines = []
    for row in _rows(frame):
        cells = []
        for column in columns:
            rank = column.rank(row)
            value = "" if isinstance(rank, float) and math.isnan(rank) else str(rank)
            name = classes.get(column.title, "")
            cells.append(f'<td class="{name}" data-v="{html.escape(value)}">{html.escape(column.show(row))}</td>')
        lines.append(f'<tr class="{html.escape(row["family"])}">{"".join(cells)}</tr>')
    head, body = f"<thead><tr>{head}</tr></thead>", "\n".join(lines)
    return f'<div class="wide"><table class="sort">{head}<tbody>\n{body}\n</tbody></table></div>'


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = html.escape(picture.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
