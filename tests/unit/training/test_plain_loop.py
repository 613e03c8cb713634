"""The recipe of the plain loop: on a tiny autoencoder it learns, and leaves a model that the package takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dyndit
from dyndit.models.dit import DiTConfig
from dyndit.recipes.plain_accelerate_loop import train
from dyndit.storage import load as checkpoints
from dyndit.training.data import PictureFolder
from support.autoencoders import make_autoencoder


@pytest.fixture
def pictures(tmp_path: Path) -> PictureFolder:
    """64 pictures of two flat colours, one a class."""
    for label, level in enumerate((60, 200)):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True)
        for k in range(32):
            Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(folder / f"{k}.png")
    return PictureFolder(tmp_path / "pictures", 16)


def test_the_plain_loop_learns_and_its_model_is_one_of_the_packages(
    pictures: PictureFolder, tmp_path: Path, capsys
) -> None:
    vae = make_autoencoder(tmp_path / "vae", in_channels=3, out_channels=3, shift_factor=None)
    config = DiTConfig(8, 4, 4, width=48, num_blocks=2, num_heads=2, num_classes=2, learn_variance=False)
    losses = []
    for num_epochs in (1, 60):
        torch.manual_seed(0)
        model = train(pictures, vae, config, num_epochs, rate=3e-3)
        losses.append(float(capsys.readouterr().out.split()[-1]))
    assert losses[1] < 0.8 * losses[0]
    checkpoints.save(model, tmp_path / "model")
    found = dyndit.load(tmp_path / "model")
    assert found.identity == model.identity
    assert not found.pixel_space
    assert found.process.name == "ddpm"
    drawn = dyndit.sample(found, labels=[0, 1], num_steps=4)
    assert drawn.latents.shape == (2, 4, 8, 8)


def test_the_loop_is_plain() -> None:
    """About twenty lines from the loader to the optimiser."""
    text = (Path(__file__).parents[3] / "recipes" / "plain_accelerate_loop.py").read_text()
    body = text[text.index("    accelerator = ") : text.index("    accelerator.print")]
    assert len(body.splitlines()) <= 26
