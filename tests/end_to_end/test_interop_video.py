"""The video examples of docs/interop.md, as they stand but for sizes, scales and numbers of steps."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from support.families import cogvideox, hunyuan_video15, ltx2, wan
from support.tiny_pipelines import TinyPipeline

INTEROP = Path(__file__).parents[2] / "docs" / "interop.md"
SHORT = "dyndit.Distill(fit=dyndit.FitConfig(steps=2, batch_size=4))"

FAMILIES: dict[str, Callable[[int], TinyPipeline]] = {
    "Wan 2.2.": wan.two_experts,
    "CogVideoX.": cogvideox.tiny,
    "HunyuanVideo 1.5.": hunyuan_video15.tiny,
    "LTX-2.": ltx2.tiny,
}


def example(title: str) -> str:
    """The Python block under a title."""
    block = re.search(rf"{re.escape(title)}.*?```python\n(.*?)```", INTEROP.read_text(), re.S)
    assert block is not None, f"docs/interop.md: no example under {title!r}"
    return block[1]


def shortened(code: str, tiny: TinyPipeline) -> str:
    """The code with the tiny pipeline's sizes in both of its calls, few steps, and a short distillation."""
    sizes = {name: value for name, value in tiny.settings.items() if name not in (*ltx2.GUIDANCE, "output_type")}
    for pattern, new, times in (
        (r"num_inference_steps=\d+", "num_inference_steps=3", 2),
        (r"dyndit\.Distill\(\)", SHORT, 1),
        (r'pipe\("a red cat"', f'pipe("a red cat", **{sizes!r}', 2),
    ):
        code, changed = re.subn(pattern, new, code)
        assert changed == times, pattern
    return code


@pytest.mark.parametrize("title", FAMILIES)
def test_a_familys_example(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = FAMILIES[title](0)
    kind = type(tiny.pipe)
    monkeypatch.setattr(kind, "from_pretrained", lambda name: tiny.pipe)
    code = example(f"**{title}**")
    assert f"diffusers.{kind.__name__}.from_pretrained" in code
    names: dict = {}
    exec(example("## Video, family by family").replace("start=8", "start=1") + shortened(code, tiny), names)
    assert len(names["video"]) == tiny.settings["num_frames"]
    assert "sound" not in names or names["sound"].isfinite().all()
    handles = names["handles"].values() if "handles" in names else [names["handle"]]
    for handle in handles:
        stats = handle.stats()
        assert set(stats["branch"]) == {"cond", "uncond"}
        assert stats["depth"].iloc[0] == 1
    assert len(list(tmp_path.rglob("exits.safetensors"))) == len(handles)
