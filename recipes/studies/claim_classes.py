"""CIFAR-10: would a plan per class be better? Plans that were searched for all classes, chosen class by class.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    python -m dyndit.recipes.studies.claim_classes --model runs/claim-heads/wide/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-classes \\
        --plans docs/results/claim/plans-?/plans/plan-*.json                                       # resumable

The plans are the five that the claim's calibrations searched; the model is the backbone with one set of the claim's
exits, here the wide ones that `claim_heads` leaves. Every class is drawn under every plan, from the same noise. One
half of a class's pictures chooses its plan by `resnet20-cifar10`; the other half measures the class's Fréchet distance
to its real pictures, under its own plan and under the one plan whose mean over classes is least on the first half. It
is the cheapest form of plans per class: choosing among plans that were searched for all classes. A search per class
would need a table per class, ten times the calibration.

A gain is the one plan's distance less the own plan's; its interval is over the ten classes. Fixed before the run: plans
per class are better if the lower limit is above zero by both extractors, `vgg-cifar10` having chosen nothing. The
claim's primary extractor scores nothing here.

Measured (docs/results/claim-classes): a plan per class gains 0.99 ± 0.76 of FD-resnet20 (one plan 7.82) and 1.65 ± 1.66
of FD-vgg (7.08), so it is not shown to be better. By FD-vgg another of the plans, for all classes, is better than both.
In fp32 on 2 cores of an AMD EPYC without bf16, 2026-12-01: 10 to 12 minutes a plan.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro

from dyndit import manifest, sealed_csv
from dyndit.analysis.metrics.extractors import Extractor, load_extractor
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, bind
from dyndit.progress import progress_bar
from dyndit.sampling.sample import sample
from dyndit.stats import Moments, frechet_distance, moments, paired_interval
from dyndit.storage import load as checkpoints
from dyndit.training.data import Pictures, open_data

SEED = 21_000
"""Of no comparison."""
BATCH = 50
ROWS = "classes.csv"
KEY = ("plan", "class", "half")
HALVES = ("chooses", "measures")


def distances(
    model: DynamicDepth, plan: DepthPlan, num_images: int, real: dict[Extractor, Sequence[Moments]]
) -> pd.DataFrame:
    """Draw every class under a plan -> a row per class and half, a column per extractor.

    real: the moments of each class's real pictures.
    """
    (num_classes,) = {len(classes) for classes in real.values()}
    labels = [label for label in range(num_classes) for _ in range(num_images)]
    made = sample(model, labels, plan=plan, seed=SEED, batch_size=BATCH).pictures
    rows = [{"class": label, "half": half} for label in range(num_classes) for half in HALVES]
    for extractor, classes in real.items():
        features = extractor.features(made).split(num_images)
        parts = [part for found in features for part in (found[::2], found[1::2])]
        for row, part in zip(rows, parts, strict=True):
            row[extractor.name] = frechet_distance(moments(part), classes[row["class"]])
    return pd.DataFrame(rows)


def compared(rows: pd.DataFrame, choosing: str, measuring: str) -> tuple[str, dict[int, str], pd.DataFrame]:
    """Choose on one half by an extractor, measure on the other by an extractor.

    -> the one plan, the plan of each class, and per class the distance under the one plan and under its own.
    """
    first, second = (
        rows[rows["half"] == half].pivot(index="class", columns="plan", values=name)
        for half, name in zip(HALVES, (choosing, measuring), strict=True)
    )
    one, own = str(first.mean().idxmin()), first.idxmin(axis=1)
    owns = [second.loc[label, plan] for label, plan in own.items()]
    table = pd.DataFrame({"one plan": second[one], "own plan": owns}, index=second.index)
    return one, {int(label): str(plan) for label, plan in own.items()}, table


def _real(extractor: Extractor, pictures: Pictures) -> list[Moments]:
    """Return the moments of the real pictures of every class."""
    features, labels = extractor.features(pictures.uint8()), torch.tensor(pictures.labels)
    return [moments(features[labels == label]) for label in range(int(labels.max()) + 1)]


def main(
    model: str,
    data: str,
    extractor_weights: Path,
    plans: tuple[Path, ...],
    out: Path,
    num_images: int = 400,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> None:
    """Draw `num_images` pictures of every class under every plan, and print what a plan per class gains."""
    drawn_by, pictures = checkpoints.load(model), open_data(data, 32, 3)
    extractors = [load_extractor("resnet20-cifar10", extractor_weights), load_extractor("vgg-cifar10")]
    found = [bind(replace(DepthPlan.load(file), exits=""), drawn_by, origin=str(file)) for file in plans]
    settings = {"model": [drawn_by.identity.backbone, drawn_by.identity.exits], "data": pictures.fingerprint}
    settings |= {"plans": [f"{plan.cfg_scale:g} {' '.join(map(str, plan.steps))}" for plan in found]}
    settings |= {"num_images": num_images, "precision": precision}
    manifest.claim(out, settings | {"extractors": [one.fingerprint for one in extractors]})
    real = {one: _real(one, pictures) for one in extractors}
    rows = sealed_csv.read(path, KEY) if (path := out / ROWS).exists() else pd.DataFrame({name: [] for name in KEY})
    with progress_bar("drawing", unit="plans") as advance:
        for number, plan in enumerate(found):
            advance(number, len(found))
            if (name := f"plan{number}") in set(rows["plan"]):
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                scored = distances(drawn_by, plan, num_images, real).assign(plan=name)
            known = [rows] * (not rows.empty)
            sealed_csv.write(path, pd.concat([*known, scored]))
            rows = sealed_csv.read(path, KEY)
    for extractor in extractors:
        one, own, table = compared(rows, extractors[0].name, extractor.name)
        gain = paired_interval(table["one plan"], table["own plan"])
        print(table.round(2).T.to_string())
        means = " and ".join(f"{table[name].mean():.2f}" for name in table)
        print(
            f"{extractor.metric_name}: {one} for all and a plan per class have {means}; "
            f"gain {gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
        )
    print(", ".join(f"class {label}: {plan}" for label, plan in own.items()))


if __name__ == "__main__":
    tyro.cli(main)
