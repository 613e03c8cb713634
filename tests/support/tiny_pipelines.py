"""Every adapter's family as diffusers ships it, tiny: its pipeline class, unmodified, with all that belongs in it.

Transformers have random weights all through; text encoders, tokenizers and VAEs are made here. `TINY_PIPELINES` has a
function per adapter, by the name of the class it serves.
"""

import importlib
import pkgutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from support.models import randomise

WORDS = ("", "a", "red", "blue", "cat", "dog", "on", "the", "moon", "blurry")
PROMPTS = ("a red cat", "the blue dog on a cat", "a moon")
NEGATIVE = "blurry"
TEXT_LENGTH = 8
# 8 x 12 latents: height and width differ.
SIZE = {"height": 16, "width": 24}


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline, and how to call it."""

    pipe: DiffusionPipeline
    guided: Callable[[int], dict[str, object]]
    """Arguments of a guided call for so many pictures."""
    unguided: Callable[[int], dict[str, object]]
    settings: dict[str, object] = field(default_factory=dict)
    """Arguments of every call."""
    num_steps: int = 3
    channels: int = 1
    """The dimension of the latents that has the channels."""

    def run(self, *, guided: bool = True, count: int = 1, seed: int = 0, **changes: object) -> Tensor:
        """Call the pipeline as a user does; what comes out, as one tensor."""
        arguments = {
            "generator": [torch.Generator().manual_seed(seed + index) for index in range(count)],
            "num_inference_steps": self.num_steps,
            "return_dict": False,
            **self.settings,
            **(self.guided if guided else self.unguided)(count),
            **changes,
        }
        return torch.as_tensor(self.pipe(**arguments)[0])

    @property
    def transformer(self) -> nn.Module:
        """The pipeline's own."""
        return self.pipe.transformer


def whole(output: tuple[Tensor | list[Tensor], ...]) -> Tensor:
    """What a transformer returns, as one tensor: Z-Image returns a list with a tensor per row, LTX-2 sound too."""
    if isinstance(output[0], list):
        return torch.stack(output[0])
    return output[0] if len(output) == 1 else torch.cat(output, dim=1)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def tokenizer(clip: bool) -> transformers.PreTrainedTokenizerFast:
    """A word is a token; CLIP's way puts a token on both sides, T5's one at the end."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "<unk>", "<s>", "</s>", *WORDS[1:]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if clip else "$A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TEXT_LENGTH, **names)


def t5(width: int = 32) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return seeded(transformers.T5EncoderModel(config))


def clip(projected: bool, seed: int = 0) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return seeded(kind(config), seed)


def vae(**changes: object) -> AutoencoderKL:
    """Half the size of the picture, four channels."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return seeded(AutoencoderKL(**config | changes))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random weights that depend on its class and the seed alone."""
    randomise(module, zlib.crc32(type(module).__name__.encode()) + seed)
    return module.eval()


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(count: int) -> list[str]:
    return [PROMPTS[index % len(PROMPTS)] for index in range(count)]


def dit(seed: int) -> TinyPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    seeded(transformer, seed)
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:  # a DiT has one embedder
        block.norm1.emb.load_state_dict(first)
    pipe = diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler())

    def call(count: int, scale: float) -> dict[str, object]:
        return {"class_labels": [(207 + 153 * index) % 1000 for index in range(count)], "guidance_scale": scale}

    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), {"output_type": "pt"})


def pixart(seed: int) -> TinyPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=128,  # the size at which the pipeline passes resolution and aspect ratio
    )
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer(clip=False),
        t5(),
        vae(),
        seeded(transformer, seed),
        diffusers.DPMSolverMultistepScheduler(beta_end=0.004),
    )

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    settings = {
        **SIZE,
        "output_type": "latent",
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": TEXT_LENGTH,
    }
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings)


def sd3(seed: int) -> TinyPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=24,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        seeded(transformer, seed),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(scaling_factor=1.5, shift_factor=0.1),
        clip(projected=True),
        tokenizer(clip=True),
        clip(projected=True, seed=1),
        tokenizer(clip=True),
        t5(),
        tokenizer(clip=False),
    )

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "guidance_scale": scale}

    settings = {**SIZE, "output_type": "latent", "max_sequence_length": TEXT_LENGTH}
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings)


def flux(seed: int) -> TinyPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae(scaling_factor=1.5, shift_factor=0.1),
        clip(projected=False),
        tokenizer(clip=True),
        t5(),
        tokenizer(clip=False),
        seeded(transformer, seed),
    )

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": [NEGATIVE] * count, "true_cfg_scale": scale}

    settings = {**SIZE, "output_type": "latent", "max_sequence_length": TEXT_LENGTH}
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings)


def latte(seed: int) -> TinyPipeline:
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=32,
        video_length=3,
    )
    pipe = diffusers.LattePipeline(
        tokenizer(clip=False), t5(), vae(), seeded(transformer, seed), diffusers.DDIMScheduler()
    )

    def call(count: int, scale: float) -> dict[str, object]:
        return {"prompt": prompts(count), "negative_prompt": NEGATIVE, "guidance_scale": scale}

    settings = {**SIZE, "output_type": "latent", "video_length": 3, "clean_caption": False}
    return TinyPipeline(quiet(pipe), lambda n: call(n, 4.0), lambda n: call(n, 1.0), settings)


TINY_PIPELINES: dict[str, Callable[[int], TinyPipeline]] = {
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "LatteTransformer3DModel": latte,
}


def _add_families() -> None:
    """Add the families with a file of their own, `support/families/NAME.py`: its `FAMILY` and its `tiny(seed)`."""
    from support import families

    for found in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{found.name}")
        TINY_PIPELINES[module.FAMILY] = module.tiny


_add_families()


def tiny_pipeline(serves: str, seed: int = 0) -> TinyPipeline:
    """The tiny pipeline of the adapter that serves this class; a family without one is a failed test, said so."""
    assert serves in TINY_PIPELINES, f"add a tiny pipeline of {serves}: a file in tests/support/families"
    return TINY_PIPELINES[serves](seed)
