"""The layout of diffusers' `SD3Transformer2DModel`, without the second attention of Stable Diffusion 3.5 medium.

diffusers splits queries, keys and values, stores positions of a larger grid and cuts them from its middle, and has
scale before shift where a layer has no gate. The class embeds no text: our text embedder lies beside its weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.models.base import Inputs
from dyndit.models.captions import POOLED, TOKENS
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.mmdit import MMDiT, MMDiTConfig
from dyndit.storage.layout import PIXEL_SPACE, PROCESS, checked_sizes, private
from dyndit.storage.names import POSITIONS, num_blocks

TEXT = "_dyndit_text"
"""Name in config.json of the text's source: the fields of `MMDiTConfig` that the class lacks."""
_OF_TEXT = ("text_length", "vocabulary", "num_classes", "text_encoder", "text_encoder_hash", "prompts", "dropout")
_EMBEDDER = "text_embedder."
_DEFAULTS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
}
"""Defaults of the class, which a config.json may leave out."""
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_STREAMS = {
    "x_block": {
        "adaLN_modulation.1": ("norm1.linear",),
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.proj": ("attn.to_out.0",),
        "attn.ln_q": ("attn.norm_q",),
        "attn.ln_k": ("attn.norm_k",),
        "mlp.fc1": ("ff.net.0.proj",),
        "mlp.fc2": ("ff.net.2",),
    },
    "context_block": {
        "adaLN_modulation.1": ("norm1_context.linear",),
        "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.proj": ("attn.to_add_out",),
        "attn.ln_q": ("attn.norm_added_q",),
        "attn.ln_k": ("attn.norm_added_k",),
        "mlp.fc1": ("ff_context.net.0.proj",),
        "mlp.fc2": ("ff_context.net.2",),
    },
}


class SD3Layout:
    """See `Layout`."""

    name = "SD3Transformer2DModel"
    family = MMDiT
    private = (PIXEL_SPACE, PROCESS, TEXT)
    companion = "text_embedder.safetensors"
    matched = ""

    def serves(self, raw: Mapping[str, Any]) -> bool:
        """See `Layout`."""
        return raw.get("_class_name") == self.name

    def config(self, model: DynamicDepth) -> dict[str, Any]:
        """See `Layout`."""
        c = MMDiTConfig(**model.backbone.config())
        if int(c.width * c.mlp_ratio) != 4 * c.width:
            raise InputError(f"{self.name} cannot hold mlp_ratio {c.mlp_ratio:g}; expected mlp_ratio 4")
        if not isinstance(c.image_size, int):
            raise InputError(f"{self.name} cannot hold image_size {c.image_size}; expected a square")
        import diffusers

        return {
            "_class_name": self.name,
            "_diffusers_version": diffusers.__version__,
            PIXEL_SPACE: model.pixel_space,
            PROCESS: model.process.config(),
            TEXT: {name: getattr(c, name) for name in _OF_TEXT},
            "sample_size": c.image_size,
            "patch_size": c.patch_size,
            "in_channels": c.in_channels,
            "out_channels": c.in_channels,
            "num_layers": c.num_blocks,
            "attention_head_dim": c.width // c.num_heads,
            "num_attention_heads": c.num_heads,
            "joint_attention_dim": c.text_width,
            "caption_projection_dim": c.width,
            "pooled_projection_dim": c.pooled_width,
            "pos_embed_max_size": c.grid[0],
            "dual_attention_layers": [],
            "qk_norm": "rms_norm" if c.qk_norm else None,
        }

    def native(
        self, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Layout`. Without an embedder of its own the text comes as features."""
        embedder = {name: tensor for name, tensor in tensors.items() if name.startswith(_EMBEDDER)}
        config = self._architecture(raw, bool(embedder), path)
        left = {name: tensor for name, tensor in tensors.items() if name not in embedder}
        if (found := num_blocks(left)) != config.num_blocks:
            raise CheckpointError(f"{path}: num_layers is {config.num_blocks}, but the weights hold {found} blocks")
        try:
            native = {"pos_embed": _cut(left.pop(POSITIONS), *config.grid)}
            for ours, theirs, swapped in _pairs(config.num_blocks, config.qk_norm):
                native[ours] = _swapped(torch.cat([left.pop(name) for name in theirs]), swapped)
        except KeyError as error:
            raise CheckpointError(f"{path}: the weights beside it lack the tensor {error}") from error
        except (ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the weights beside it are no {self.name}'s ({first_line(error)})"
            ) from error
        if left:
            raise CheckpointError(f"{path}: the weights beside it have {len(left)} extra tensors, first {min(left)}")
        return asdict(config), native | embedder

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Layout`."""
        blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("joint_blocks."))
        theirs = {POSITIONS: tensors["pos_embed"]}
        for ours, names, swapped in _pairs(blocks, "joint_blocks.0.x_block.attn.ln_q.weight" in tensors):
            parts = _swapped(tensors[ours], swapped).chunk(len(names))
            theirs |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
        return theirs, {name: tensor for name, tensor in tensors.items() if name.startswith(_EMBEDDER)}

    def notes(self, raw: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """See `Layout`."""
        heads = f"{folder.name}: {config['num_heads']} attention heads, as config.json records"
        if config["vocabulary"] or config["num_classes"] or config["text_encoder"]:
            return (heads,)
        return heads, f"{folder.name}: takes text as features, {TOKENS} and {POOLED}; no prompts"

    def module(self, model: DynamicDepth, config: Mapping[str, Any]) -> nn.Module:
        """Convert to diffusers' class in memory. A text embedder stays behind (`MMDiT.text_of`)."""
        from diffusers import SD3Transformer2DModel

        arguments: dict[str, Any] = {name: value for name, value in config.items() if not name.startswith("_")}
        arguments["dual_attention_layers"] = ()
        transformer = SD3Transformer2DModel(**arguments)
        transformer.load_state_dict(self.split(model.backbone.state_dict())[0])
        return transformer

    def recorded(self, transformer: Any) -> dict[str, Any]:
        """See `Layout`."""
        return dict(transformer.config) | {"_class_name": self.name}

    def call(self, transformer: Any, model: DynamicDepth, inputs: Inputs) -> Tensor:
        """See `Layout`."""
        backbone: Any = model.backbone
        rows = backbone.text_of(inputs.y).rows
        return transformer(inputs.x, rows[TOKENS], rows[POOLED], inputs.t, return_dict=False)[0]

    def loaded_plainly(self, model: DynamicDepth, transformer: Any) -> tuple[tuple[str, ...], str]:
        """See `Layout`. The class has an argument for everything."""
        return (), ""

    def _architecture(self, raw: Mapping[str, Any], embeds: bool, path: Path) -> MMDiTConfig:
        sizes = checked_sizes(raw, _DEFAULTS, path)
        width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
        expected = {
            "out_channels": (raw.get("out_channels", 16), (None, sizes["in_channels"])),
            "caption_projection_dim": (sizes["caption_projection_dim"], (width,)),
            "qk_norm": (raw.get("qk_norm"), (None, "rms_norm")),
            "dual_attention_layers": (list(raw.get("dual_attention_layers") or []), ([],)),
        }
        for name, (found, wanted) in expected.items():
            if found not in wanted:
                raise CheckpointError(f"{path}: {name} is {found!r:.40}, expected {wanted[-1]!r}")
        if sizes["sample_size"] > sizes["pos_embed_max_size"] * sizes["patch_size"]:
            raise CheckpointError(
                f"{path}: sample_size is {sizes['sample_size']}, expected at most {sizes['pos_embed_max_size']} patches"
            )
        text = private(raw, TEXT, dict, {}, path)
        text = {name: value for name, value in text.items() if embeds or name not in ("vocabulary", "num_classes")}
        try:
            config = MMDiTConfig(
                image_size=sizes["sample_size"],
                patch_size=sizes["patch_size"],
                in_channels=sizes["in_channels"],
                width=width,
                num_blocks=sizes["num_layers"],
                num_heads=sizes["num_attention_heads"],
                qk_norm=raw.get("qk_norm") is not None,
                text_width=sizes["joint_attention_dim"],
                pooled_width=sizes["pooled_projection_dim"],
                **text,
            )
        except (InputError, TypeError) as error:
            raise CheckpointError(f"{path}: impossible architecture ({error})") from error
        if config.embeds != embeds:
            raise CheckpointError(f"{path}: {self.companion} lies beside it, but {TEXT} records no words or labels")
        return config


def _pairs(blocks: int, qk_norm: bool) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Yield each native tensor, the class's tensors that it joins, and whether scale and shift are exchanged."""
    for kind in ("weight", "bias"):
        for ours, name in _OUTER.items():
            yield f"{ours}.{kind}", (f"{name}.{kind}",), False
        yield f"final_layer.adaLN_modulation.1.{kind}", (f"norm_out.linear.{kind}",), True
        for index in range(blocks):
            for stream, names in _STREAMS.items():
                read_only = stream == "context_block" and index + 1 == blocks
                for ours, theirs in names.items():
                    norm = ours.startswith("attn.ln_")
                    if (norm and (not qk_norm or kind == "bias")) or (
                        read_only and ours in ("attn.proj", "mlp.fc1", "mlp.fc2")
                    ):
                        continue
                    there = tuple(f"transformer_blocks.{index}.{name}.{kind}" for name in theirs)
                    swapped = read_only and ours == "adaLN_modulation.1"
                    yield f"joint_blocks.{index}.{stream}.{ours}.{kind}", there, swapped


def _swapped(tensor: Tensor, swapped: bool) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor


def _cut(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Cut the middle of square positions.  (1, M * M, D) -> (1, rows * columns, D)."""
    side = round(positions.shape[1] ** 0.5)
    top, left = (side - rows) // 2, (side - columns) // 2
    grid = positions.reshape(1, side, side, -1)[:, top : top + rows, left : left + columns]
    return grid.reshape(1, rows * columns, -1).contiguous()
