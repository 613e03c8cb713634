"""Rows of a claim, as its protocol draws them."""

import random

import pandas as pd

from dyndit.analysis.report.claims import EXPLAINING, PRIMARY, RIVALS, Claim, claims_of
from support.runs import run_row

EXTRACTORS = ("resnet20-cifar10", "vgg-cifar10", PRIMARY)
FAMILIES = {letter: family for letter, (family, _) in (RIVALS | EXPLAINING).items()}


def noise(calibration: int, family: str) -> float:
    """A difference between calibrations, so that there is a variance."""
    return random.Random(f"{calibration} {family}").gauss(0, 0.02)


def rows_of(calibration: int, changes: dict[str, dict] | None = None) -> list[dict]:
    """The rows of one calibration: A at FD 10, G at the same in 45% of the time, rivals at 11 in G's time.

    changes: by family: other figures, a function of the calibration where they are callable; None leaves it out.
    """
    arms = {"A": {"ms": 100.0, "fd": 10.0}, "searched": {"ms": 45.0, "fd": 10.1}}
    arms |= {family: {"ms": 45.0, "fd": 11.0} for family in FAMILIES.values()}
    arms["full"] = {"ms": 100.0, "fd": 10.5, "arm": "full-unipc-20", "calibration": ""}
    found = []
    for k, (family, figures) in enumerate(arms.items()):
        own = (changes or {}).get(family, {})
        if own is None:
            continue
        own = {name: value(calibration) if callable(value) else value for name, value in own.items()}
        figures = figures | own
        fd = figures["fd"] + 0.3 * calibration + noise(calibration, family)  # calibrations differ more than arms
        row = {"arm": f"{family}-c{calibration}", "family": family, "calibration": str(calibration), "solver": "unipc"}
        row |= {"run": f"claim-{calibration}", "steps": 20, "seed": 10_000 + calibration, "precision": 0.7, "macs": 1e9}
        row |= {
            "batch_size": "50",
            "num_images": 5000,
            "ms_per_picture": figures["ms"],
            "fd": fd,
            "cfg_scale": 1 + k / 8,
        }
        row |= {name: value for name, value in figures.items() if name not in ("ms", "fd")}
        if family == "searched":
            row["precision"] += noise(calibration, family) / 10
        for extractor in EXTRACTORS:
            own = row | {"extractor": extractor, "metric": f"FD-{extractor}"}
            found += [run_row(**own), run_row(**own | {"role": "time", "batch_size": "1"})]
    return found


def runs_of(changes: dict[str, dict] | None = None, num: int = 5) -> list[pd.DataFrame]:
    return [pd.DataFrame(rows_of(k, changes)) for k in range(num)]


def claim_of(changes: dict[str, dict] | None = None, num: int = 5) -> Claim:
    (claim,) = claims_of(runs_of(changes, num), 0.03)
    return claim
