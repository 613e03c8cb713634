"""Publish the parts of the claim, report them, and write the README's table from the published rows.

    python docs/scripts/claim.py runs/claim    # copy the parts that ran in runs/claim/0 to 4; then report and table
    python docs/scripts/claim.py               # report and table alone

The table stands between two marks in README.md. Without the marks it is printed.
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
from dyndit.analysis.report.cells import number, percent
from dyndit.analysis.report.claim_goals import p_value, sentences
from dyndit.analysis.report.claims import BETTER, FULL, PLAN, PRIMARY, RIVALS, WORSE, Claim, claims_of
from dyndit.analysis.report.runs import RUNS, runs_below
from dyndit.manifest import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
FOLDER, README, BACKBONE = ROOT / "docs/results/claim", ROOT / "README.md", ROOT / "recipes/weights/cifar10"
MARKS = re.compile(r"(?<=<!-- claim -->\n).*?(?=<!-- end of claim -->)", re.DOTALL)
MARGIN = 0.03
PARTS, STAGES = ("plans", "rivals"), ("scale", "plan")
"""Parts of a calibration's folder, and the stages that they share."""
WHOLE = (RUNS, MATCHED, "exit-errors.csv")
"""Files of a part that are published as the run wrote them; its plans are too."""
STEPS = ("exits", "table", "plan")
"""What a calibration spends its minutes on."""
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
    """Write the README's part: the protocol's sentences, the table, and what the plan costs.

    costs: rows of all parts' trainings.csv.
    """
    head = ["the plan, less ...", "its time / the plan's", *(f"FD-{name}" for name in claim.extractors), "precision"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], _against_full(claim), *_against_rivals(claim)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([" ".join(sentences(claim)), rows, _rests_on(claim, costs)]) + "\n"


def _against_full(claim: Claim) -> list[str]:
    """Return the row of full depth; bold where quality is unchanged."""
    cells = []
    for name in claim.extractors:
        difference, full, _ = claim.against_full(name)
        cells.append(_bold(f"{difference:+.2f}", when=difference.high <= claim.margin * full) + f" of {full:.2f}")
    return [f"full depth, {claim.point}", _ratio(claim, FULL), *cells, _precision(claim, FULL)]


def _against_rivals(claim: Claim) -> Iterator[list[str]]:
    """Yield the rows of the nearest rivals by the extractor that decides; bold where the plan is better."""
    frames = {name: claim.comparisons(name).set_index("letter") for name in claim.extractors}
    first = frames[claim.extractors[0]]
    for letter in first.index[first["outcome"] != ""][:NEAREST]:
        family, what = RIVALS[letter]
        cells = [_told(frames[name].loc[letter]) for name in claim.extractors]
        yield [f"{letter}: {what}", _ratio(claim, family), *cells, _precision(claim, family)]


def _told(row: pd.Series) -> str:
    """Write a difference of FD, with its corrected p value where there is one."""
    p = "" if math.isnan(row["corrected"]) else f" (p {p_value(row['corrected'])})"
    return _bold(f"{row['diff']:+.2f}", when=row["outcome"] == BETTER) + p + ", worse" * (row["outcome"] == WORSE)


def _bold(text: str, *, when: bool) -> str:
    return f"**{text}**" if when else text


def _ratio(claim: Claim, family: str) -> str:
    """Write an arm's time over the plan's, the mean over calibrations."""
    plan, own = claim.paired(claim.extractors[0], family, "ms_per_picture")
    return f"{fmean(own[k] / plan[k] for k in own):.2f}"


def _precision(claim: Claim, family: str) -> str:
    """Write the plan's precision less an arm's, the mean over calibrations."""
    plan, own = claim.paired(claim.extractors[0], family, "precision")
    return f"{fmean(plan[k] - own[k] for k in own):+.2f}"


def _rests_on(claim: Claim, costs: pd.DataFrame) -> str:
    """Say what the table rests on, and what a plan costs."""
    plans, full = claim.paired(claim.extractors[0], FULL, "ms_per_picture")
    rows, minutes = claim.of(claim.extractors[0], PLAN), costs.groupby("name")["seconds"].mean() / 60
    spent = ", ".join(f"{name} {minutes[name]:.0f}" for name in STEPS)
    backbone = sum(weight.numel() for weight in dyndit.load(str(BACKBONE)).backbone.parameters())
    added = costs.loc[costs["name"] == STEPS[0], "parameters"].iloc[0] / backbone
    machines = " and ".join(sorted(set(rows["machine"])))
    batch, once = rows["batch_size"].iloc[0], percent(claim.saved("time")[0])
    ms, full_ms = (number(fmean(found.values())) for found in (plans, full))
    told = [
        f"Lower FD is better. {claim.words.capitalize()} of {rows['num_images'].iloc[0]:,.0f} pictures an arm; "
        f"intervals, and p values after Holm, over calibrations; {machines}.",
        f"Bold: unchanged within {claim.margin:.0%}, or better. {PRIMARY} decides: nothing was chosen by it.",
        f"A picture takes {ms} ms where full depth takes {full_ms}, in batches of {batch}; one by one {once} is saved.",
        f"The plan costs {minutes[list(STEPS)].sum():.0f} minutes ({spent}), and {added:.0%} more parameters.",
    ]
    return " ".join(told)


def main(runs: Path | None = None) -> None:
    """Publish the parts, if a folder is named; write report and table."""
    if runs is not None:
        publish(runs)
    del sys.argv[1:]  # the report, which records its command, rests on what is published, not on where it ran
    report()
    found, readme = table(claim_in(), costs_in()), README.read_text(encoding="utf-8")
    if MARKS.search(readme):
        files.write_text(README, MARKS.sub(lambda _: found, readme))
    else:
        print(found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
