"""The README's Python examples, run as they stand but for file names and numbers of steps."""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dyndit
from dyndit.storage.convert import convert
from dyndit.training.data import load_digits
from support.tiny_pipelines import tiny_pipeline

README = Path(__file__).parents[2] / "README.md"
FIT = "dyndit.FitConfig(steps=20, batch_size=32, learning_rate=1e-3)"
TABLE = "dyndit.CalibrationSettings(num_pictures=66, num_bands=2, num_depths=2)"
SHORT = "dyndit.Distill(fit=dyndit.FitConfig(steps=3, batch_size=4))"


def example(title: str, changes: dict[str, str]) -> str:
    """The Python block under a bold title, shortened; every change has to find what it changes."""
    text = README.read_text()
    block = re.search(rf"\*\*{re.escape(title)}\*\*.*?```python\n(.*?)```", text, re.S)
    assert block is not None, f"README: no example under {title!r}"
    code = block[1]
    for old, new in changes.items():
        assert old in code, f"README: {title!r} does not say {old!r}"
        code = code.replace(old, new)
    return code


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


class Net(nn.Module):
    """Somebody's transformer on pixels: 16 patches of 8 x 8."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, self.width, 8, 8)
        self.labels = nn.Embedding(11, self.width)
        self.blocks = nn.ModuleList(Mixer(self.width) for _ in range(8))
        self.final = Final(self.width)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def condition(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.labels(y) + torch.sin(t[:, None] / 100 * torch.arange(self.width))

    def pixels(self, patches: torch.Tensor) -> torch.Tensor:
        return nn.functional.fold(patches.transpose(1, 2), 32, 8, stride=8)


class Mixer(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, tokens: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return tokens + torch.tanh(super().forward(tokens + tokens.mean(1, keepdim=True) + cond[:, None]))


class Final(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * 8 * 8)

    def forward(self, tokens: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens * (1 + cond[:, None]))


def test_your_own_model(here: Path) -> None:
    torch.manual_seed(0)
    arrays = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    write_pictures(here / "pictures", arrays, [i % 10 for i in range(20)])
    net = Net().eval()
    names = {"net": net, "pictures": dyndit.open_data("pictures", 32)}
    exec(example("Your own model.", {"dyndit.Distill()": SHORT}), names)
    assert names["drawn"].pictures.shape == (2, 3, 32, 32)
    assert names["drawn"].plan.depths[0] == 4
    assert names["drawn"].plan.depths[-1] == 8
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([9, 700]), torch.tensor([1, 10])
    tokens, cond = net.tokens(x), net.condition(t, y)
    for block in net.blocks:
        tokens = block(tokens, cond)
    assert torch.equal(names["model"](x, t, y), net.pixels(net.final(tokens, cond)))
