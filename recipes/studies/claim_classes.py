"""CIFAR-10: would a plan per class be better? The plans of `claim_tries`, chosen class by class.

    python -m dyndit.recipes.studies.claim_classes --run runs/claim-tries --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors

Every class is drawn under every plan. The first half of a class's pictures chooses its plan by `resnet20-cifar10`; the
second half measures the class's Fréchet distance to its real pictures, under its own plan and under the one plan whose
mean over classes is least on the first half. It is the cheapest form of plans per class: choosing among plans that were
searched for all classes. A search per class would need a table per class, ten times the calibration.

Result and minutes: not yet measured.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor

from dyndit.analysis.metrics.extractors import Extractor, load_extractor
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, bind
from dyndit.progress import progress_bar
from dyndit.sampling.sample import sample
from dyndit.stats import frechet_distance, moments, paired_interval
from dyndit.storage import load as checkpoints
from dyndit.training.data import open_data

SEED = 21_000
"""Of no comparison."""


def plans_of(run: Path) -> dict[str, tuple[DynamicDepth, DepthPlan]]:
    """Load the run's plan and its variants' plans, each with its own exits."""
    found, own = {}, checkpoints.load(str(run / "model"))
    for folder in (run, *sorted((run / "variants").iterdir())):
        trained = (folder / "model" / checkpoints.EXITS).exists()
        model = checkpoints.load(str(folder / "model")) if trained else own
        for file in sorted(folder.glob("plan-*-b*.json")):
            found["plain" if folder == run else folder.name] = (
                model,
                bind(DepthPlan.load(file), model, origin=str(file)),
            )
    return found


def halves(features: Tensor) -> tuple[Tensor, Tensor]:
    """Split pictures, (N, D), into the half that chooses and the half that measures."""
    return features[::2], features[1::2]


def distances(drawn: dict[str, Sequence[Tensor]], real: Sequence[Tensor]) -> pd.DataFrame:
    """Return the Fréchet distance of each class.  drawn: plan -> features per class -> a row per class and half."""
    rows = [
        {"plan": plan, "class": label, "half": half, "fd": frechet_distance(moments(part), moments(real[label]))}
        for plan, classes in drawn.items()
        for label, features in enumerate(classes)
        for half, part in enumerate(halves(features))
    ]
    return pd.DataFrame(rows)


def compared(choosing: pd.DataFrame, measuring: pd.DataFrame) -> tuple[str, dict[int, str], list[float]]:
    """Choose on half 0 of `choosing`, measure on half 1 of `measuring`.

    -> the one plan, the plan of each class, and per class what its own plan has less than the one plan.
    """
    first = choosing[choosing["half"] == 0].pivot(index="class", columns="plan", values="fd")
    second = measuring[measuring["half"] == 1].pivot(index="class", columns="plan", values="fd")
    one, own = str(first.mean().idxmin()), first.idxmin(axis=1)
    gains = [float(second.loc[label, one] - second.loc[label, plan]) for label, plan in own.items()]
    return one, {int(label): str(plan) for label, plan in own.items()}, gains


def main(run: Path, data: str, extractor_weights: Path, num_images: int = 500, device: str = "cpu") -> None:
    """Draw `num_images` pictures of every class under every plan, and print what a plan per class gains."""
    plans, pictures = plans_of(run), open_data(data, 32, 3)
    extractors = [
        load_extractor("resnet20-cifar10", extractor_weights, device),
        load_extractor("vgg-cifar10", None, device),
    ]
    labels = torch.tensor(pictures.labels)
    num_classes = int(labels.max()) + 1
    drawn: list[dict[str, Sequence[Tensor]]] = [{} for _ in extractors]
    with progress_bar("drawing", unit="plans") as advance, torch.autocast(device, torch.bfloat16):
        for number, (name, (model, plan)) in enumerate(plans.items()):
            advance(number, len(plans))
            classes = [label for label in range(num_classes) for _ in range(num_images)]
            made = sample(model.to(device), classes, plan=plan, seed=SEED, batch_size=50, progress=False).pictures
            for found, extractor in zip(drawn, extractors, strict=True):
                found[name] = extractor.features(made).split(num_images)
    tables = [distances(found, _real(one, pictures, labels)) for found, one in zip(drawn, extractors, strict=True)]
    for extractor, table in zip(extractors, tables, strict=True):
        one, own, gains = compared(tables[0], table)
        gain = paired_interval(gains)
        gained = f"{gain.mean:.2f} ({gain.low:.2f} to {gain.high:.2f})"
        print(f"{extractor.metric_name}: a plan per class gains {gained} on the one plan '{one}'")
    print(", ".join(f"class {label}: {plan}" for label, plan in own.items()))


def _real(extractor: Extractor, pictures: object, labels: Tensor) -> list[Tensor]:
    """Return the features of the real pictures of every class."""
    features = extractor.features(pictures.uint8())  # pyright: ignore[reportAttributeAccessIssue]
    return [features[labels == label] for label in range(int(labels.max()) + 1)]


if __name__ == "__main__":
    tyro.cli(main)
