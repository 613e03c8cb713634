"""A rehearsal of the claim: both commands of its script, on a tiny model, from the backbone to the report."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from dyndit.analysis.compare.evolution import Evolution
from dyndit.analysis.compare.experiment import Inputs
from dyndit.analysis.compare.tuning import Tuning
from dyndit.analysis.metrics.extractors.cifar10 import ResNet20
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.recipes.cifar10_frontier import CHOICES
from dyndit.recipes.studies import claim
from dyndit.storage import load as checkpoints
from support.models import randomise
from support.pictures import noise, save

BACKBONE = DiTConfig(32, 16, 3, width=16, num_blocks=12, num_heads=2, num_classes=2)
NUM_IMAGES = 66


def thinned(tuning: Tuning) -> Tuning:
    """First and last setting and scale of every grid."""
    ends = lambda values: values[:1] + values[1:][-1:]  # noqa: E731
    return replace(tuning, peers=ends(tuning.peers), scales=ends(tuning.scales))


@pytest.fixture(scope="module")
def rehearsal() -> claim.Protocol:
    """The protocol with its depths, choices and arms, of few steps, pictures, updates and settings."""
    whole = claim.calibration
    distill = replace(whole.distill, num_steps=4, num_trajectories=8)
    distill = replace(distill, fit=replace(distill.fit, steps=2, batch_size=8, checkpoint_every=1))
    table = CalibrationSettings(num_pictures=66, num_bands=3, batch_size=66, choices=CHOICES, forecast_ages=1)
    few = {"num_images": NUM_IMAGES, "batch_size": 33, "more_extractors": ("vgg-cifar10",), "calibration_steps": 3}
    chosen = replace(whole, distill=distill, calibration=table, **few)
    effort = Evolution(generations=1, population=2)
    return claim.Protocol(
        steps=4, counts=(2, 3, 4), lock_steps=3, calibration=chosen, evolution=effort, thinned=thinned
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    backbone = ClassConditionalDiT(BACKBONE)
    randomise(backbone, seed=0)
    checkpoints.save(DynamicDepth(backbone, pixel_space=True), folder / "model")
    for k in range(80):
        save(folder / "pictures" / "ab"[k % 2] / f"{k}.png", noise(32, 32, 3, seed=k))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(ResNet20().state_dict(), folder / "resnet20.safetensors")
    return Inputs(
        model=str(folder / "model"), data=str(folder / "pictures"), extractor_weights=folder / "resnet20.safetensors"
    )


def test_the_whole_protocol(rehearsal: claim.Protocol, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "0"
    claim.carry_out(0, inputs, out, protocol=rehearsal)
    page = claim.carry_out(0, inputs, out, minutes=1.0, updates=2, protocol=rehearsal)
    assert page.is_file()
    rows = pd.read_csv(out / "compare" / "runs.csv")
    print(rows[["arm", "fd", "ms_per_picture", "calibration"]].to_string())
