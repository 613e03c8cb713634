"""NaN and infinities: met before anything is written, and named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dyndit
from dyndit.calibration.measure import CalibrationSettings, measure_shifts
from dyndit.errors import CheckpointError, InputError
from dyndit.models.dit import DiTConfig
from dyndit.models.exits import ExitConfig
from dyndit.process import DDPM, RectifiedFlow
from dyndit.sampling.sample import sample_into
from dyndit.storage import load as checkpoints
from dyndit.training.autoencoders import decode_latents, load_autoencoder
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill
from dyndit.training.latents import encode_latents
from dyndit.training.recorded import record_sampling
from dyndit.training.subset import Some
from dyndit.training.train import Train
from support.autoencoders import make_autoencoder
from support.tables import random_table

SMALL = {"num_blocks": 2, "width": 8, "num_heads": 2}
BAD = (float("nan"), float("inf"))


def spoiled(model: dyndit.DynamicDepth, value: float) -> dyndit.DynamicDepth:
    model.backbone.blocks[1].mlp.fc1.weight.data[0, 0] = value
    return model


@pytest.mark.reliability("A model that gives NaN or infinities: sampling stops, names the batch, and writes no picture")
@pytest.mark.parametrize("value", BAD)
def test_sampling_a_spoiled_model_says_so(value: float, make_model, tmp_path: Path) -> None:
    model = spoiled(make_model(**SMALL), value)
    with pytest.raises(InputError, match="batch 0 to 2 are not finite after 2 steps"):
        sample_into(tmp_path / "out", model, None, 3, num_steps=2)
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(InputError, match="not finite"):
        dyndit.sample(model, [1], num_steps=2)


@pytest.mark.reliability("Calibrating a model that gives NaN stops, and writes no table")
def test_calibrating_a_spoiled_model_says_so(make_model, tmp_path: Path) -> None:
    extractor = dyndit.load_extractor("digits")
    settings = CalibrationSettings(num_pictures=80, num_bands=1, batch_size=40, num_depths=2)
    model = spoiled(make_model(**SMALL), float("nan"))
    reference = random_table(1, 2, seed=0, num_features=64).reference
    with pytest.raises(InputError, match="batch 0 to 39 are not finite"):
        measure_shifts(
            model, extractor, reference, num_steps=1, settings=settings, into=tmp_path / "shift-table.safetensors"
        )
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".dyndit")]


@pytest.mark.reliability("NaN or infinities in weights, exits or tables are neither written nor read")
@pytest.mark.parametrize("value", BAD)
def test_weights_and_tables_that_are_not_finite_are_not_written(value: float, make_model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight holds numbers that are not finite"):
        checkpoints.save(spoiled(make_model(**SMALL), value), tmp_path / "model")
    table = random_table(2, 3, seed=0)
    table.second[0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match="second of the shift table is not finite"):
        table.save(tmp_path / "table.safetensors")
    path = tmp_path / "model.pt"
    torch.save({"ema": spoiled(make_model(**SMALL), value).backbone.state_dict()}, path)
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoints.load(path, num_heads=2)
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["model.pt"]


@pytest.mark.reliability("An autoencoder that is not finite is refused; latents or pictures that are not, are not kept")
@pytest.mark.parametrize("value", BAD)
def test_an_autoencoder_that_is_not_finite(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_autoencoder(tmp_path / "vae")
    vae = load_autoencoder(place)
    next(vae.encoder.parameters()).data[0] = value
    next(vae.decoder.parameters()).data[0] = value
    with pytest.raises(InputError, match="pictures of a batch of 2 are not finite"):
        decode_latents(vae, torch.randn(3, 4, 4, 4), batch_size=2)
    monkeypatch.setattr("dyndit.training.latents.load_autoencoder", lambda _: vae)
    with pytest.raises(InputError, match="latents of a batch of 3 are not finite"):
        encode_latents(Some(load_digits(), 3), place, tmp_path / "latents", progress=False)
    assert not list((tmp_path / "latents").glob("*.safetensors"))
    vae.save_pretrained(place)
    with pytest.raises(InputError, match="holds numbers that are not finite"):
        load_autoencoder(place)


@pytest.mark.reliability("A recorded call that is not finite stops the recording")
def test_a_call_that_is_not_finite_is_not_recorded(make_model, tmp_path: Path) -> None:
    model = spoiled(make_model(**SMALL), float("nan"))
    with pytest.raises(InputError, match=r"call \d has x that is not finite"):
        record_sampling(model, [1], tmp_path / "calls", num_steps=2)
    assert len(list((tmp_path / "calls").iterdir())) == 1


CONFIG = DiTConfig(8, 4, 1, width=8, num_blocks=2, num_heads=2, num_classes=10)


@pytest.mark.reliability("An update that makes weights infinite is found after the update, and not saved")
def test_weights_are_checked_after_the_update(tmp_path: Path) -> None:
    """At the last step no later loss would tell."""
    recipe = Train(CONFIG, FitConfig(1, 8, learning_rate=1e39, ema_decay=0.0))
    with pytest.raises(InputError, match=r"after the last step .* is not finite, and is not saved"):
        recipe.run(load_digits(), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.reliability("A process that was edited between stop and resume is refused, in train and in distill")
def test_the_process_is_in_the_resume_key(tmp_path: Path, make_model) -> None:
    data, fit = load_digits(), FitConfig(2, 4, checkpoint_every=1)
    train = Train(CONFIG, fit)
    train.run(data, tmp_path / "train")
    changed = DDPM(beta_end=0.05)
    for other in (changed, RectifiedFlow()):
        config = replace(CONFIG, learn_variance=other.has_variance)
        with pytest.raises(InputError, match="expected"):
            replace(train, backbone=config, process=other).run(data, tmp_path / "train")
    model = make_model(**SMALL)
    distill = Distill(ExitConfig((1,)), fit)
    distill.run(model, data, tmp_path / "distill")
    edited = dyndit.DynamicDepth(model.backbone, model.exits, process=changed)
    with pytest.raises(InputError, match="identity"):
        distill.run(edited, data, tmp_path / "distill")
