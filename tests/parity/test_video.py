"""The spatial-temporal DiT against a plain one, written from the papers in tests/support/reference_video.py."""

from dataclasses import replace

import pytest
import torch

from dyndit.models.video import VideoConfig
from support.models import randomise
from support.reference_video import forward

CONFIG = VideoConfig(
    num_frames=4,
    image_size=8,
    patch_size=4,
    patch_frames=2,
    in_channels=2,
    width=32,
    num_blocks=2,
    num_heads=2,
    num_classes=5,
    learn_variance=True,
    rotary_base=50.0,
)


@pytest.mark.parametrize("attention", ["factorised", "full"])
@pytest.mark.parametrize("clip", [(4, 8, 8), (3, 8, 12), (1, 12, 4)])
def test_forward(attention: str, clip: tuple[int, int, int]) -> None:
    config = replace(CONFIG, attention=attention)
    backbone = config.build().eval()
    randomise(backbone, seed=0)
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(2, 2, *clip, generator=generator), torch.tensor([3, 901]), torch.tensor([4, 5])
    with torch.no_grad():
        found = backbone(x, t, y)
        weights = backbone.state_dict()
        for row in range(2):
            expected = forward(weights, config, x[row], float(t[row]), int(y[row]))
            assert expected.std() > 0.1
            torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=2e-5)
