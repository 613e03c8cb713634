"""Publish the parts of the claim, report them, and write the tables of README and results page from the published rows.

    python docs/scripts/claim.py runs/claim    # copy the parts that ran in runs/claim/0 to 4; then report and tables
    python docs/scripts/claim.py               # report and tables alone

Each page's table stands between two marks.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

import pandas as pd

import dyndit
from dyndit import files, sealed_csv, seals
from dyndit.analysis import read_runs, write_report
from dyndit.analysis.compare.costs import COSTS
from dyndit.analysis.compare.tuned import MATCHED, TUNING
from dyndit.analysis.report.cells import number
from dyndit.analysis.report.claim_goals import goals, p_value, summary
from dyndit.analysis.report.claims import (
    BETTER,
    EXPLAINING,
    FULL,
    LEVEL,
    PLAN,
    PRIMARY,
    RIVALS,
    WORSE,
    Claim,
    claims_of,
)
from dyndit.analysis.report.runs import RUNS, runs_below
from dyndit.manifest import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
FOLDER, BACKBONE = ROOT / "docs/results/claim", ROOT / "recipes/weights/cifar10"
README, RESULTS = ROOT / "README.md", ROOT / "docs/results.md"
MARKS = re.compile(r"(?<=<!--claim-->\n).*?(?=<!--/claim-->)", re.DOTALL)
MARGIN = 0.03
PARTS, STAGES = ("plans", "rivals"), ("scale", "plan")
"""Parts of a calibration's folder, and the stages that they share."""
WHOLE = (RUNS, MATCHED, "exit-errors.csv")
"""Files of a part that are published as the run wrote them; its plans are too."""
STEPS = ("exits", "table", "plan")
"""What a calibration spends its minutes on."""
FAMILIES = (RIVALS, EXPLAINING)
"""Families of comparisons, each corrected by itself."""
NEAREST = 3
"""Rivals in the README's table; the report has all."""


def publish(runs: Path, folder: Path = FOLDER) -> None:
    """Copy what each finished part rests on: rows, plans, what was tried, what it cost, its manifest."""
    for source in sorted(path.parent for part in PARTS for path in runs.glob(f"*/{part}-*/report.json")):
        target = folder / source.name
        files.remove(target)
        for name in WHOLE:
            if (source / name).is_file():
                files.copy(source / name, target / name)
        for path in source.glob("plan-*.json"):
            files.copy(path, target / "plans" / path.name)
        for path in source.glob("variants/*/plan-*.json"):
            files.copy(path, target / "plans" / f"{path.parent.name}-{path.name}")
        if source.name.startswith("rivals"):
            files.copy(source.parent / "effort.json", target / "effort.json")
        files.write_json(target / MANIFEST, placeless(files.read_json(source / MANIFEST)))
        tried = sealed_csv.read(source / TUNING, ("family", "fd"), dtype=str, keep_default_na=False)
        sealed_csv.write(target / TUNING, tried[tried["fd"] != ""])  # the others are over the limit of time
        stages = [path for stage in (*STAGES, source.name) if (path := source.parent / stage / COSTS).is_file()]
        sealed_csv.write(target / COSTS, pd.concat([sealed_csv.read(path, ("name", "seconds")) for path in stages]))


def placeless(facts: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest in which no folder of the machine is named, sealed again."""
    inputs = facts["settings"]["inputs"]
    names = {inputs["data"]: "DIR", inputs["extractor_weights"]: Path(inputs["extractor_weights"]).name}

    def told(value: object) -> object:
        if isinstance(value, dict):
            return {name: told(one) for name, one in value.items()}
        if isinstance(value, list):
            return [told(one) for one in value]
        for place, name in names.items() if isinstance(value, str) else ():
            value = value.replace(place, name)
        return value

    return seals.sealed(told(seals.unsealed(Path(MANIFEST), facts)))


def report(folder: Path = FOLDER) -> None:
    """Write the report of what is published, without files that repeat others."""
    write_report(runs_below(folder), folder, margin=MARGIN)
    for path in (*folder.glob("*.svg"), folder / "report.html"):
        files.remove(path)


def claim_in(folder: Path = FOLDER) -> Claim:
    """Return the claim of the published parts."""
    (claim,) = claims_of([read_runs(path).assign(run=path.name) for path in runs_below(folder)], MARGIN)
    return claim


def costs_in(folder: Path = FOLDER) -> pd.DataFrame:
    """Return what the published parts cost. A calibration's own rows may stand in both of its parts."""
    return pd.concat([sealed_csv.read(path, ("name", "seconds")) for path in sorted(folder.glob(f"*/{COSTS}"))])


def table(claim: Claim, costs: pd.DataFrame) -> str:
    """Write the README's part: the protocol's sentences, a table of goals and nearest rivals, and what the plan costs.

    costs: rows of all parts' trainings.csv.
    """
    names = claim.extractors
    lines = [["the plan", *(f"FD-{name}" for name in names)], ["---", *["---:"] * len(names)], *_goals(claim)]
    rows = "\n".join(f"|{'|'.join(line)}|" for line in lines)
    headline, *others = summary(claim, NEAREST)
    return "\n\n".join([f"**{headline}** {' '.join(others)}", rows, _rests_on(claim, costs)]) + "\n"


def _goals(claim: Claim) -> Iterator[list[str]]:
    """Yield the rows: every goal, and below the third the nearest rivals; bold where a goal is met."""
    found, names = goals(claim), claim.extractors
    quality, times, (rivals, precision) = found[: len(names)], found[len(names) : -2], found[-2:]
    cells = [_bold(goal.measured, when=goal.met) for goal in quality]
    yield [f"1 less full depth, upper limit ≤ {claim.margin:.0%}", *cells]
    name, asked = " and ".join(goal.name.removeprefix("2 time saved, ") for goal in times), times[0].asked
    saved = " and ".join(_bold(goal.measured, when=goal.met) for goal in times)
    yield [f"2 time saved, {name}, {asked.replace('at least', '≥')}", saved, *[""] * (len(names) - 1)]
    frames = {name: claim.comparisons(name).set_index("letter") for name in names}
    first_count, *counts = map(_beaten, frames.values())
    yield [f"{rivals.name}, better than each", _bold(first_count, when=rivals.met), *counts]
    first = frames[names[0]]
    for letter in first.index[first["outcome"] != ""][:NEAREST]:
        cells = [_difference(frames[name].loc[letter]) for name in names]
        yield [f"less {letter}, {RIVALS[letter][1]} (time × {first['ratio'][letter]:.2f})", *cells]
    falls = [f"{claim.against_full(name, 'precision')[0]:+.3f}" for name in names]
    asked = precision.asked.replace("at least", "≥")
    yield [f"4 precision less full depth's, {asked}", _bold(falls[0], when=precision.met), *falls[1:]]


def _beaten(frame: pd.DataFrame) -> str:
    return f"{(frame['outcome'] == BETTER).sum()} of {(frame['calibrations'] > 0).sum()}"


def arms(claim: Claim) -> str:
    """Write the results page's part: every arm's FD by every extractor, and what the plan's is less.

    Arms come in the order of FD by the first extractor. Bold: the plan is better, corrected within its family.
    """
    names = claim.extractors
    head = ["arm", "its time / the plan's", *(cell for name in names for cell in (f"FD-{name}", "the plan's, less"))]
    families = [{name: claim.comparisons(name, family).set_index("letter") for name in names} for family in FAMILIES]
    rows = [_arm(letter, frames) for frames in families for letter in frames[names[0]].index]
    plan, full = ([f"{fmean(claim.paired(name, FULL)[k].values()):.2f}" for name in names] for k in (0, 1))
    against = [f"{claim.against_full(name)[0]:+.2f}" for name in names]
    times = claim.paired(names[0], FULL, "ms_per_picture")
    ratio = f"{fmean(times[1][k] / times[0][k] for k in times[1]):.2f}"
    rows += [["**G: the searched plan**", "1", *(cell for fd in plan for cell in (fd, ""))]]
    rows += [["A: full depth", ratio, *(cell for pair in zip(full, against, strict=True) for cell in pair)]]
    rows.sort(key=lambda cells: float(cells[2]) if cells[2] != "–" else math.inf)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _arm(letter: str, frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return the row of a rival; dashes where a calibration's row is missing."""
    found = [frame.loc[letter] for frame in frames.values()]
    cells = [cell for row in found for cell in (_decimals(row["fd"]), _told(row))]
    return [f"{letter}: {found[0]['what']}", _decimals(found[0]["ratio"]), *cells]


def _decimals(value: float) -> str:
    """Write two decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def _told(row: pd.Series) -> str:
    """Write a difference of FD, with its corrected p value where there is one."""
    p = "" if math.isnan(row["corrected"]) else f" (p {p_value(row['corrected'])})"
    return _difference(row) + p


def _difference(row: pd.Series) -> str:
    """Write a difference of FD: bold if the plan is better, with a word if it is clearly worse."""
    return _bold(f"{row['diff']:+.2f}", when=row["outcome"] == BETTER) + " worse" * (row["outcome"] == WORSE)


def _bold(text: str, *, when: bool | None) -> str:
    return f"**{text}**" if when else text


def _rests_on(claim: Claim, costs: pd.DataFrame) -> str:
    """Say what the table rests on, and what a plan costs."""
    plans, full = claim.paired(claim.extractors[0], FULL, "ms_per_picture")
    rows, minutes = claim.of(claim.extractors[0], PLAN), costs.groupby("name")["seconds"].mean() / 60
    backbone = sum(weight.numel() for weight in dyndit.load(str(BACKBONE)).backbone.parameters())
    added = costs.loc[costs["name"] == STEPS[0], "parameters"].iloc[0] / backbone
    machines = " and ".join(sorted(set(rows["machine"])))
    batch = rows["batch_size"].iloc[0]
    ms, full_ms = (number(fmean(found.values())) for found in (plans, full))
    told = [
        f"{claim.words.capitalize()} of {rows['num_images'].iloc[0]:,.0f} pictures an arm, 95% over them; {machines}.",
        f"Bold: goal met, or plan better (p ≤ {LEVEL:g} after Holm). {PRIMARY} decides: nothing was chosen by it.",
        f"{ms} ms a picture, full depth {full_ms} (batches of {batch}).",
        f"The plan costs {minutes[list(STEPS)].sum():.0f} minutes and {added:.0%} more parameters.",
    ]
    return " ".join(told)


def tables(claim: Claim, costs: pd.DataFrame) -> dict[Path, str]:
    """Return what stands between the marks of each page."""
    return {README: table(claim, costs), RESULTS: arms(claim)}


def main(runs: Path | None = None) -> None:
    """Publish the parts, if a folder is named; write report and tables."""
    if runs is not None:
        publish(runs)
    del sys.argv[1:]  # the report, which records its command, rests on what is published, not on where it ran
    report()
    for page, found in tables(claim_in(), costs_in()).items():
        files.write_text(page, MARKS.sub(lambda _, found=found: found, page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
