"""Properties of the spatial-temporal DiT: clips of any shape, pictures as clips of one frame, no batch mates."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, compile_parts
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.video import VideoConfig, VideoDiT, rotary, rotated
from dyndit.plugin.pipeline import DynDiTPipeline
from support.models import TINY_VIDEO, randomise


@pytest.fixture(params=["factorised", "full"])
def backbone(request: pytest.FixtureRequest) -> VideoDiT:
    made = replace(TINY_VIDEO, attention=request.param).build().eval()
    randomise(made, seed=0)
    return made


def call(*clip: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 1, *clip, generator=generator), torch.tensor([5, 800])[:rows], torch.tensor([1, 9])[:rows]


@pytest.mark.parametrize("clip", [(1, 8, 8), (2, 4, 20), (5, 12, 8), (8, 16, 16)])
def test_every_shape_is_only_another_input(backbone: VideoDiT, clip: tuple[int, int, int]) -> None:
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig())).eval()
    randomise(model.exits, seed=1)
    x, t, y = call(*clip)
    with torch.no_grad():
        predictions = model.every_exit(x, t, y)
        assert all(p.shape == x.shape for p in predictions.values())
        assert torch.equal(predictions[6], backbone(x, t, y))
        alone = model(x[1:], t[1:], y[1:], 3)
    torch.testing.assert_close(alone, predictions[3][1:], atol=1e-5, rtol=1e-5)
    assert backbone.accepts((1, *clip))


def test_a_frame_is_seen_by_the_others(backbone: VideoDiT) -> None:
    x, t, y = call(6, 8, 8)
    with torch.no_grad():
        before = backbone(x, t, y)
        x[:, :, 5] += 1
        after = backbone(x, t, y)
    assert (after - before)[:, :, :2].abs().max() > 1e-3


def test_a_clip_is_filled_up_with_its_last_frame(backbone: VideoDiT) -> None:
    """A picture is a clip of one frame: the patch of two frames holds it twice."""
    x, t, y = call(1, 8, 8)
    with torch.no_grad():
        picture, twice = backbone(x, t, y), backbone(x.expand(-1, -1, 2, -1, -1), t, y)
    assert picture.shape == (2, 1, 1, 8, 8)
    assert torch.equal(picture, twice[:, :, :1])


def test_rotations_depend_on_differences_of_places_alone() -> None:
    grid, width = (4, 5, 6), 16
    turns = rotary(grid, width, 100.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, width, generator=generator)

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        rows = [(f * grid[1] + r) * grid[2] + s for f, r, s in (a, b)]
        at = [(turns[0][row], turns[1][row]) for row in rows]
        return float((rotated(q[None], at[0]) @ rotated(k[None], at[1]).T).item())

    assert score((0, 1, 2), (1, 3, 2)) == pytest.approx(score((2, 2, 5), (3, 4, 5)), abs=1e-5)
    assert abs(score((0, 1, 2), (1, 3, 2)) - score((0, 1, 2), (1, 3, 3))) > 1e-3


def test_order_of_frames_matters(backbone: VideoDiT) -> None:
    x, t, y = call(6, 8, 8)
    with torch.no_grad():
        straight, turned = backbone(x, t, y), backbone(x.flip(2), t, y)
    assert (straight - turned.flip(2)).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient(backbone: VideoDiT) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone.zero_grad()
        backbone.gradient_checkpointing = checkpointing
        backbone(*call(3, 8, 12)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_half_precision_stays_close(backbone: VideoDiT) -> None:
    x, t, y = call(3, 8, 12)
    with torch.no_grad():
        single = backbone(x, t, y)
        half = backbone.bfloat16()(x.bfloat16(), t, y)
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).abs().mean() < 0.1 * single.abs().mean()


def test_a_fresh_backbone_predicts_zero_and_blocks_pass_tokens_on() -> None:
    fresh = TINY_VIDEO.build()
    x, t, y = call(3, 8, 12)
    state = fresh.embed(x, t, y)
    assert torch.equal(fresh.block(0, state).tokens, state.tokens)
    assert not fresh(x, t, y).any()


def test_settings_that_no_tensor_shows_change_the_identity() -> None:
    made = {}
    for changes in ({}, {"num_heads": 1}, {"rotary_base": 99.0}, {"norm_eps": 1e-5}):
        backbone = replace(TINY_VIDEO, **changes).build()
        randomise(backbone, seed=0)
        made[backbone.identity()] = changes
    assert len(made) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "sparse"}, "attention 'sparse': expected one of factorised, full"),
        ({"image_size": 10}, "image_size 10: expected a multiple of patch_size 4"),
        ({"num_frames": 0}, "num_frames 0: expected at least 1"),
        ({"width": 18}, "width 18: expected an even number"),
        ({"rotary_base": 1.0}, "rotary_base 1: expected above 1"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VideoConfig(**asdict(TINY_VIDEO) | changes)


def test_clips_that_patches_do_not_fill_are_refused(backbone: VideoDiT) -> None:
    with pytest.raises(InputError, match="clips of 1 x 3 x 8 x 10: expected 1 x frames x height x width, sides"):
        backbone(*call(3, 8, 10))
    assert not backbone.accepts((1, 0, 8, 8))
    assert not backbone.accepts((2, 3, 8, 8))
    assert not backbone.accepts((1, 8, 8))


def test_blocks_are_one_graph_each(backbone: VideoDiT) -> None:
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(layers=(2,)))).eval()
    calls = [call(3, 8, 12), call(1, 8, 8)]
    with torch.no_grad():
        expected = [model(*each, depth) for each in calls for depth in (2, 6)]
        compile_parts(model, backend="eager")
        found = [model(*each, depth) for each in calls for depth in (2, 6)]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_pipelines_of_pictures_refuse_clips_and_cards_name_them(backbone: VideoDiT, tmp_path: Path) -> None:
    model = DynamicDepth(backbone).eval()
    with pytest.raises(InputError, match="makes clips; expected a model of pictures"):
        DynDiTPipeline.from_model(model)
    model.save_pretrained(tmp_path)
    assert "class-conditional-video-generation" in (tmp_path / "README.md").read_text()
    again = DynamicDepth.from_pretrained(tmp_path)
    assert again.identity == model.identity
    assert again.backbone.config() == backbone.config()
