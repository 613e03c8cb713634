"""The README's Python examples, run as they stand but for file names and numbers of steps."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import dyndit
from dyndit.storage.convert import convert
from dyndit.training.data import load_digits
from support.own import forgotten
from support.readme import NET, example
from support.tiny_pipelines import tiny_pipeline

FIT = "dyndit.FitConfig(steps=20, batch_size=32, learning_rate=1e-3)"
TABLE = "dyndit.CalibrationSettings(num_pictures=66, num_bands=2, num_depths=2)"
SHORT = "dyndit.Distill(fit=dyndit.FitConfig(steps=3, batch_size=4))"


def write_pictures(folder: Path, arrays: np.ndarray, labels: list[int]) -> None:
    for index, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        (folder / f"class-{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"class-{label}" / f"{index:04d}.png")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkpoint_of_the_published_code(here: Path) -> None:
    convert("digits", here / "my-dit.pt", "official")
    digits = load_digits()
    arrays = digits.uint8(range(200))[:, 0].numpy()
    write_pictures(here / "pictures", arrays, [digits[i][1] for i in range(200)])
    changes = {
        "dyndit.Distill()": f"dyndit.Distill(fit={FIT})",
        '"inception"': '"digits"',
        "reference=real": f"reference=real, settings={TABLE}",
    }
    names: dict = {}
    exec(example("A checkpoint of the published code.", changes), names)
    assert names["drawn"].pictures.shape == (2, 1, 8, 8)
    assert names["plan"].figures["predicted_share_of_time"] <= 0.6
    again = dyndit.load("runs/mine")
    assert again.depths == names["model"].depths == tuple(range(1, 13))
    assert again.identity.backbone == dyndit.load("my-dit.pt").identity.backbone


def test_a_pipeline_of_diffusers(here: Path) -> None:
    tiny = tiny_pipeline("DiTTransformer2DModel")
    tiny.pipe.save_pretrained("pipe")
    changes = {
        '"facebook/DiT-XL-2-256"': '"pipe"',
        "range(0, 1000, 8)": "range(0, 16, 8)",
        "num_inference_steps=20": "num_inference_steps=3",
        "dyndit.Distill()": SHORT,
        "start=14": "start=1",
    }
    names: dict = {}
    exec(example("A pipeline of diffusers.", changes), names)
    stats, num_blocks = names["handle"].stats(), names["handle"].model.num_blocks
    assert len(names["images"]) == 2
    assert stats["depth"].iloc[0] == 1
    assert stats["depth"].iloc[-1] == num_blocks > 1
    assert len(stats) == 2 * 3, "three steps, two branches"
    assert (here / "runs/exits/exits.safetensors").exists()
    assert isinstance(names["pipe"], diffusers.DiTPipeline)


def test_your_own_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    arrays = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    write_pictures(here / "pictures", arrays, [i % 10 for i in range(20)])
    (here / "my_net.py").write_text(NET)
    monkeypatch.syspath_prepend(here)
    names: dict = {"__name__": "my_module"}
    with forgotten():
        exec(example("Your own model.", {"dyndit.Distill()": SHORT, "MyDiT(192)": "MyDiT(16)"}), names)
        names["model"].save_pretrained("runs/mine")
        assert dyndit.load("runs/mine").identity == names["model"].identity
    assert names["drawn"].pictures.shape == (2, 3, 32, 32)
    assert names["drawn"].plan.depths[0] == 4
    assert names["drawn"].plan.depths[-1] == 8
    net = names["model"].backbone.net
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([9, 700]), torch.tensor([1, 10])
    tokens, cond = net.tokens(x), net.condition(t, y)
    for block in net.blocks:
        tokens = block(tokens, cond)
    assert torch.equal(names["model"](x, t, y), net.pixels(net.final(tokens, cond)))
