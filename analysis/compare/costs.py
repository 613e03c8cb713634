"""Note what trainings cost: trainings.csv, a row per training."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from dyndit import sealed_csv
from dyndit.analysis.metrics.macs import Macs, flops, model_macs
from dyndit.models.dynamic import DynamicDepth
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.fit import FitResult

COSTS = "trainings.csv"
PASSES = 3
"""Passes' worth of arithmetic in an update: forward once, backward twice."""


def backbone_cost(model: DynamicDepth, fit: FitConfig, result: FitResult) -> dict[str, float]:
    """Return the figures of a backbone's training: its size, what it saw, its arithmetic and its time."""
    macs = model_macs(model)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    return {"parameters": parameters, **_cost(macs, PASSES * macs.full, fit, result)}


def exits_cost(model: DynamicDepth, distill: Distill, result: FitResult) -> dict[str, float]:
    """Return the same figures of the exits. A frozen backbone runs forward only; one that trains has a teacher too."""
    macs, parameters = model_macs(model), sum(p.numel() for p in model.exits.parameters())
    heads = sum(macs.leave[depth] for depth in model.exits.layers)
    backbone = macs.full if distill.backbone == "frozen" else (1 + PASSES) * macs.full
    backbone += macs.full * bool(distill.guides)  # the pass without the condition
    cost = _cost(macs, backbone + PASSES * heads, distill.fit, result)
    if macs.recall:  # learned on both branches of sampled trajectories
        sampled = 2 * macs.full * distill.num_steps * distill.num_trajectories
        seen = distill.recall_fit.steps * distill.recall_fit.batch_size
        cost["training_flops"] += flops(sampled + PASSES * sum(macs.recall.values()) * seen)
    return {"parameters": parameters, **cost}


def _cost(macs: Macs, per_picture: int, fit: FitConfig, result: FitResult) -> dict[str, float]:
    pictures = fit.steps * fit.batch_size
    return {
        "tokens": macs.tokens,
        "macs": macs.full,
        "updates": fit.steps,
        "pictures": pictures,
        "training_flops": flops(per_picture) * pictures,
        # A resumed run is charged for all of its updates at the pace of the last call.
        "seconds": result.whole(fit.steps),
    }


def note(path: Path, row: Mapping[str, object]) -> None:
    """Add a training's row, or put it in the place of an earlier one. Seconds that are not known stay the earlier's.

    row: "name" and "seed" tell a training from the others.
    """
    new, sealed = pd.DataFrame([row]), True
    if path.exists():
        sealed, old = sealed_csv.check(path), sealed_csv.read(path, ("name", "seed", "seconds"))
        same = (old["name"] == row["name"]) & (old["seed"] == row["seed"])
        if same.any() and math.isnan(row["seconds"]):
            new["seconds"] = old.loc[same, "seconds"].iloc[0]
        new = pd.concat([old[~same], new])
    sealed_csv.write(path, new, sealed=sealed)
