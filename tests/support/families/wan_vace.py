"""Wan with control."""

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor

from support.families.wan import around, from_embeddings, parts, transformer
from support.tiny_pipelines import TinyPipeline

FAMILY = "WanVACETransformer3DModel"


class Several(diffusers.WanVACEPipeline):
    """The pipeline, for several control videos at once. The original makes the control of one only."""

    def prepare_video_latents(
        self, video: Tensor, mask: Tensor, reference_images: list, generator: None, device: torch.device
    ) -> Tensor:
        """See the original."""
        parts = zip(video.split(1), mask.split(1), reference_images, strict=True)
        make = super().prepare_video_latents
        return torch.cat([make(own, its, [pictures], generator, device) for own, its, pictures in parts])

    def prepare_masks(self, mask: Tensor, reference_images: list, generator: None) -> Tensor:
        """See the original."""
        parts = zip(mask.split(1), reference_images, strict=True)
        make = super().prepare_masks
        return torch.cat([make(its, [pictures], generator) for its, pictures in parts])


class OneGenerator(TinyPipeline):
    """A pipeline that takes one generator at most, so that pictures get their noise as latents."""

    def run(
        self, *, count: int = 1, seed: int = 0, generator: list[torch.Generator] | None = None, **changes: object
    ) -> Tensor:
        """See `TinyPipeline`."""
        generators = generator or [torch.Generator().manual_seed(seed + index) for index in range(count)]
        latents = torch.stack([torch.randn(4, 3, 8, 12, generator=own) for own in generators])
        return super().run(count=count, generator=None, latents=latents, **changes)


def tiny(seed: int) -> TinyPipeline:
    """Control blocks beside blocks 0 and 2; a control video, and strengths."""
    # The control has both halves of the video's latents (4 each) and the mask at 8 x 8 pixels a latent.
    changes = {"kind": diffusers.WanVACETransformer3DModel, "vace_layers": [0, 2], "vace_in_channels": 72}
    pipe = Several(**parts(), transformer=transformer(seed, **changes))
    tiny = from_embeddings(around(pipe, conditioning_scale=[1.0, 0.5]))

    def of(call: Callable[[int], dict[str, object]]) -> Callable[[int], dict[str, object]]:
        return lambda count: call(count) | {"video": video.expand(count, -1, -1, -1, -1)}

    video = torch.rand(1, 9, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    return OneGenerator(pipe, of(tiny.guided), of(tiny.unguided), tiny.settings)
