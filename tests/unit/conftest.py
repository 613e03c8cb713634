"""A tiny model of twelve blocks, pictures, and weights of an extractor, to rehearse studies with."""

import pytest
import torch
from safetensors.torch import save_file

from dyndit.analysis.compare.experiment import Inputs
from dyndit.analysis.metrics.extractors.cifar10 import ResNet20
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import load as checkpoints
from support.models import randomise
from support.pictures import noise, save

BACKBONE = DiTConfig(32, 16, 3, width=16, num_blocks=12, num_heads=2, num_classes=2)


@pytest.fixture(scope="session")
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
