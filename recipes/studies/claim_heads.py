"""CIFAR-10: do lighter heads serve the claim's plans as well? The same plans, three sets of exits.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    python -m dyndit.recipes.studies.claim_heads --model recipes/weights/cifar10 --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-heads \\
        --plans docs/results/claim/plans-?/plans/plan-*.json                                       # resumable

The plans are the five that the claim's calibrations searched. Every set of exits is trained as the claim trains, all
from one seed, and draws the same noise and labels under every plan; the arms take turns batch by batch.

| heads | exits | learned forecasts |
|---|---|---|
| wide | the claim's: MLPs of 4 and 2 times the backbone's width | MLP of twice the width |
| slim | an MLP as wide as the backbone, which no condition modulates | the same |
| light | plain, of the final layer's shape | MLP as wide as the backbone |

Their parameters are printed as a share of the backbone's, their arithmetic as a share of the plan's. A difference is
lighter heads less wide ones, paired by plan; its interval is over plans, each of which is one mean over the blocks. All
plans run one training of each set, whose luck the interval does not hold. Fixed before the run: lighter heads serve as
well if the upper limit of their difference is at most 3% of the wide heads' mean, by both extractors. The claim's
primary extractor scores nothing here.

Measured (docs/results/claim-heads): light heads, 8.8% of the backbone where wide ones are 26%, lose 0.45 ± 0.55 of
FD-resnet20 and 0.24 ± 0.40 of FD-vgg; slim ones, 15%, lose 0.70 ± 0.68 and 0.35 ± 0.35. So neither is shown to serve as
well. In fp32 on 2 cores of an AMD EPYC without bf16, 2026-11-30: 12 to 15 minutes a training (23 beside other work),
the pictures about 75.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from torch import Tensor

from dyndit import manifest
from dyndit.analysis.compare.blocks import drawn_in_blocks
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.macs import model_macs
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig
from dyndit.pictures.check import cache_folder
from dyndit.plans.plan import DepthPlan, bind
from dyndit.recipes.cifar10_frontier import experiment as frontier
from dyndit.sampling.sample import sample
from dyndit.stats import paired_interval
from dyndit.storage import load as checkpoints
from dyndit.training.data import Pictures, open_data

EXITS, RECALL = (2, 4, 6, 8), (2,)
SEED, TRAINING_SEED = 22_000, 8_000
"""Of pictures and of training; no comparison has them."""
BATCH = 50
ROWS = "heads.csv"
SETS = {
    "wide": ExitConfig(EXITS, recall=RECALL),
    "slim": ExitConfig(EXITS, "slim", recall=RECALL),
    "light": ExitConfig(EXITS, "adaln-linear", recall=RECALL, recall_ratio=1),
}
Precision = Literal["fp32", "bf16"]

exits = replace(
    frontier.distill,
    exits=SETS["wide"],
    forecasts=False,
    num_trajectories=512,
    cfg_scale=2.5,
    fit=replace(frontier.distill.fit, steps=500, checkpoint_every=100),
    recall_fit=replace(frontier.distill.recall_fit, steps=700, precision=frontier.distill.fit.precision),
)
"""The claim's, but for the seed."""


def trained(name: str, backbone: DynamicDepth, data: Pictures, out: Path, precision: Precision) -> DynamicDepth:
    """Train a set of exits as the claim does, or load it from `out`."""
    folder = out / name / "model"
    if not (folder / checkpoints.EXITS).exists():
        print(f"{name}: training", flush=True)
        distill = replace(exits, exits=SETS[name], fit=replace(exits.fit, seed=TRAINING_SEED))
        began = time.monotonic()
        model, _ = distill.in_precision(precision).run(backbone, data, out / name)
        checkpoints.save(model, folder)
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return checkpoints.load(folder)


def plans_for(files: Sequence[Path], model: DynamicDepth) -> dict[str, DepthPlan]:
    """Read the plans, numbered in the order given. They may have been searched with other exits."""
    plans = [replace(DepthPlan.load(file), exits="") for file in files]
    return {
        f"plan{k}": bind(plan, model, origin=str(file)) for k, (plan, file) in enumerate(zip(plans, files, strict=True))
    }


def _drawn(model: DynamicDepth, plan: DepthPlan, precision: Precision, block: int, batch: int) -> Tensor:
    labels = model.backbone.condition.in_turn(BATCH, batch * BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        how = {"seed": SEED + block, "first_index": batch * BATCH, "batch_size": BATCH, "progress": False}
        return sample(model, labels, plan=plan, **how).pictures


def _run_by(file: Path) -> str:
    """Return what a plan does, as text."""
    plan = DepthPlan.load(file)
    return f"{plan.solver} {plan.cfg_scale:g} {plan.timesteps} {' '.join(map(str, plan.steps))}"


def added(model: DynamicDepth) -> float:
    """Return the parameters of the heads as a share of the backbone's."""
    assert model.exits is not None
    own, backbone = (sum(p.numel() for p in part.parameters()) for part in (model.exits, model.backbone))
    return own / backbone


def compared(rows: pd.DataFrame, heads: str) -> dict[str, tuple[float, float, float]]:
    """Return the mean and 95% limits of lighter less wide heads over plans, by each extractor."""
    means = rows.groupby(["heads", "plan"]).mean(numeric_only=True)
    ours, wide = means.loc[heads], means.loc["wide"]
    found = {name: paired_interval(ours[name], wide[name]) for name in means if name != "block"}
    return {name: (one.mean, one.low, one.high) for name, one in found.items()}


def main(
    model: str,
    data: str,
    extractor_weights: Path,
    plans: tuple[Path, ...],
    out: Path,
    num_images: int = 300,
    num_blocks: int = 5,
    precision: Precision = "bf16",
) -> None:
    """Train the three sets of exits, draw `num_blocks` times `num_images` pictures under every plan, and compare."""
    backbone, pictures = checkpoints.load(model), open_data(data, 32, 3)
    extractors = [load_extractor("resnet20-cifar10", extractor_weights), load_extractor("vgg-cifar10")]
    settings = {"backbone": backbone.identity.backbone, "plans": [_run_by(file) for file in plans]}
    settings |= {"num_images": num_images, "precision": precision, "data": pictures.fingerprint}
    manifest.claim(out, settings | {"extractors": [one.fingerprint for one in extractors]})
    models = {name: trained(name, backbone, pictures, out, precision) for name in SETS}
    arms = [(name, key, plan) for name, one in models.items() for key, plan in plans_for(plans, one).items()]
    real = [Measured(PictureSet(data, pictures), one, cache=cache_folder()) for one in extractors]
    draws = {arm[:2]: partial(_drawn, models[arm[0]], arm[2], precision) for arm in arms}
    rows = drawn_in_blocks(out / ROWS, ("heads", "plan"), draws, real, (num_blocks, num_images // BATCH))
    print(rows.groupby(["heads", "plan"]).mean(numeric_only=True).drop(columns="block").round(3).to_string())
    for name, one in models.items():
        macs = model_macs(one)
        share = max(macs.heads(plan) / macs.plan(plan) for mine, _, plan in arms if mine == name)
        print(f"{name}: {added(one):.1%} of the backbone's parameters, at most {share:.1%} of a plan's arithmetic")
        if name != "wide":
            for figure, (mean, low, high) in compared(rows, name).items():
                print(f"  {figure}: {mean:+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    tyro.cli(main)
