"""The examples of docs/interop.md that run a family's pipeline, as they stand but for sizes and the weights' place."""

import re
from pathlib import Path

import pytest
import torch

import dyndit
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plugin.adapters import adapt
from dyndit.storage.load import EXITS, save_exits
from support.aura_flow import aura_flow, one_sequence
from support.models import randomise
from support.tiny_pipelines import TinyPipeline, tiny_pipeline

INTEROP = Path(__file__).parents[2] / "docs" / "interop.md"

FAMILIES = {
    "PixArt.": ("PixArtTransformer2DModel", True),
    "Stable Diffusion 3.": ("SD3Transformer2DModel", True),
    "Flux.": ("FluxTransformer2DModel", False),
    "Latte.": ("LatteTransformer3DModel", True),
    "Sana.": ("SanaTransformer2DModel", True),
    "Lumina-Image 2.0.": ("Lumina2Transformer2DModel", True),
    "Qwen-Image.": ("QwenImageTransformer2DModel", True),
    "FLUX.2 Klein.": ("Flux2Transformer2DModel", True),
    "Z-Image.": ("ZImageTransformer2DModel", False),
}
"""Title of an example: the class that it runs, and True if its calls are guided."""


def example(title: str) -> str:
    """The Python block under a title."""
    block = re.search(rf"{re.escape(title)}.*?```python\n(.*?)```", INTEROP.read_text(), re.S)
    assert block is not None, f"docs/interop.md: no example under {title!r}"
    return block[1]


def shortened(code: str, tiny: TinyPipeline) -> str:
    """The code with the tiny pipeline's settings in its call, and few steps."""
    settings = {name: value for name, value in tiny.settings.items() if name != "output_type"}
    for pattern, new in ((r"start=\d+", "start=1"), (r"num_inference_steps=\d+", "num_inference_steps=3")):
        code, changed = re.subn(pattern, new, code)
        assert changed == 1, pattern
    assert code.count("pipe(\n") + code.count('pipe("') == 1
    return re.sub(r"\bpipe\((?=\n|\")", lambda found: f"{found[0]}**{settings!r}, prompt=", code)


@pytest.mark.parametrize("title", FAMILIES)
def test_a_familys_example(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family, guided = FAMILIES[title]
    tiny = tiny_pipeline(family)
    adapter = adapt(tiny.transformer)
    exits = Exits(adapter, ExitConfig(head="adaln-linear"))
    randomise(exits, 3)
    (tmp_path / "runs/exits").mkdir(parents=True)
    save_exits(exits, tmp_path / "runs/exits" / EXITS, adapter.identity())
    kind = type(tiny.pipe)
    monkeypatch.setattr(kind, "from_pretrained", lambda name, **_: tiny.pipe)
    code = shortened(example(f"**{title}**"), tiny)
    assert f"diffusers.{kind.__name__}.from_pretrained" in code
    names: dict = {}
    exec(example("## Families, one by one") + code, names)
    assert names["image"].size in ((24, 16), (96, 64))
    stats = names["handle"].stats()
    depths = stats[stats["branch"] == "cond"]["depth"].tolist()
    assert depths[0] < depths[-1] == 4
    assert set(stats["branch"]) == ({"cond", "uncond"} if guided else {"cond"})


def test_a_transformer_that_no_adapter_knows() -> None:
    tiny = aura_flow()
    expected = tiny.run(guided=False)
    names: dict = {"dyndit": dyndit, "pipe": tiny.pipe, "one_sequence": one_sequence, "exits": None, "plan": None}
    exec(example("## A transformer that no adapter knows"), names)
    assert torch.equal(tiny.run(guided=False), expected)
    handle = names["handle"]
    handle.plan = handle.full_plan()
    assert torch.equal(tiny.run(guided=False), expected)
    assert handle.adapter is names["adapter"]
