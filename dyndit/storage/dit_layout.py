"""The layout of diffusers' `DiTTransformer2DModel`.

Settings that the class has no argument for stand in config.json under names that begin with `_dyndit_`. The main one is
the shift of the timestep frequencies: 0 in the published code, while the class always starts with 1 (see
`match_frequencies`).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.models.base import Inputs
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.layers import position_features
from dyndit.storage.layout import PIXEL_SPACE, PROCESS, checked_sizes, private
from dyndit.storage.names import (
    FREQUENCY_SHIFT,
    POSITIONS,
    frequency_shift_of,
    from_native,
    match_frequencies,
    num_blocks,
    own_positions,
    to_native,
)

LABEL_DROPOUT = "_dyndit_label_dropout"

_NORM_EPS = 1e-6
"""Epsilon of the norms before attention and before the output. The class hard-codes it."""
_FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
"""Arguments of the class that have one value for every DiT."""
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
"""Defaults of the class, which a config.json may leave out."""
_MOST_PATCHES = 512
"""Most patches across. They refuse an edited file before it fills the memory."""


class DiTLayout:
    """See `Layout`."""

    name = "DiTTransformer2DModel"
    family = ClassConditionalDiT
    private = (FREQUENCY_SHIFT, PIXEL_SPACE, LABEL_DROPOUT, PROCESS)
    companion = ""
    matched = ", with matched frequencies"

    def serves(self, raw: Mapping[str, Any]) -> bool:
        """Tell whether a config.json is of the class, or of `Transformer2DModel`, its home in older diffusers."""
        name = raw.get("_class_name")
        return name == self.name or (name == "Transformer2DModel" and raw.get("norm_type") == "ada_norm_zero")

    def config(self, model: DynamicDepth) -> dict[str, Any]:
        """See `Layout`."""
        backbone = model.backbone
        c = DiTConfig(**backbone.config())
        limits = {
            f"mlp_ratio {c.mlp_ratio:g}": int(c.width * c.mlp_ratio) == 4 * c.width,
            "a backbone without null class": c.label_dropout > 0,
            f"norm_eps {c.norm_eps:g}": c.norm_eps == _NORM_EPS,
            f"the time and velocity of {c.convention}": c.convention == "timesteps",
            f"the conditioning {c.conditioning}": c.conditioning == "adaln-zero",
        }
        for found, fits in limits.items():
            if not fits:
                expected = "mlp_ratio 4, a null class, norm_eps 1e-6, timesteps, adaln-zero"
                raise InputError(f"{self.name} cannot hold {found}; expected {expected}")
        try:
            own_positions(backbone.state_dict())
        except CheckpointError as error:
            raise InputError(f"{self.name}: {error}") from error
        import diffusers

        return {
            "_class_name": self.name,
            "_diffusers_version": diffusers.__version__,
            FREQUENCY_SHIFT: c.frequency_shift,
            PIXEL_SPACE: model.pixel_space,
            LABEL_DROPOUT: c.label_dropout,
            PROCESS: model.process.config(),
            **_FIXED,
            "num_attention_heads": c.num_heads,
            "attention_head_dim": c.width // c.num_heads,
            "in_channels": c.in_channels,
            "out_channels": backbone.out_channels,
            "num_layers": c.num_blocks,
            "sample_size": c.image_size,
            "patch_size": c.patch_size,
            "num_embeds_ada_norm": c.num_classes,
            "norm_eps": c.mlp_norm_eps,
        }

    def native(
        self, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Layout`."""
        config = self._architecture(raw, path)
        try:
            if (found := num_blocks(tensors)) != config.num_blocks:
                raise CheckpointError(f"{path}: num_layers is {config.num_blocks}, but the weights hold {found} blocks")
            width = tensors["pos_embed.proj.weight"].shape[0]
            if width != config.width:
                raise CheckpointError(f"{path}: heads are {config.width} wide in all, but the weights are {width} wide")
            return asdict(config), to_native(tensors, config.size[0] // config.patch_size)
        except CheckpointError as error:
            raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the weights beside it are no {self.name}'s ({first_line(error)})"
            ) from error

    def split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Layout`."""
        return from_native(tensors), {}

    def notes(self, raw: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        """See `Layout`."""
        how = f"as {FREQUENCY_SHIFT} records" if FREQUENCY_SHIFT in raw else "diffusers' own"
        return (
            f"{folder.name}: {config['num_heads']} attention heads, as config.json records",
            f"{folder.name}: timestep frequencies with shift {config['frequency_shift']}, {how}; norm_eps "
            f"{config['mlp_norm_eps']:g} of the MLPs",
        )

    def module(self, model: DynamicDepth, config: Mapping[str, Any]) -> nn.Module:
        """Convert to diffusers' class in memory, with the model's own timestep frequencies."""
        from diffusers import DiTTransformer2DModel

        transformer: Any = DiTTransformer2DModel(**{name: v for name, v in config.items() if not name.startswith("_")})
        tensors = from_native(model.backbone.state_dict())
        positions = tensors.pop(POSITIONS, None)
        transformer.load_state_dict(tensors)
        if positions is not None:
            transformer.pos_embed.pos_embed.copy_(positions)
        match_frequencies(transformer, config[FREQUENCY_SHIFT])
        return transformer

    def recorded(self, transformer: Any) -> dict[str, Any]:
        """See `Layout`. The frequencies are the transformer's present ones."""
        shift = frequency_shift_of(transformer)
        recorded = transformer.config.get(FREQUENCY_SHIFT, shift)
        if recorded != shift:
            raise CheckpointError(
                f"{self.name}: runs with frequency shift {shift}, but its config records {recorded}; expected "
                f"dyndit.storage.names.match_frequencies(transformer, {recorded}) after loading"
            )
        return dict(transformer.config) | {"_class_name": self.name, FREQUENCY_SHIFT: shift}

    def call(self, transformer: Any, model: DynamicDepth, inputs: Inputs) -> Tensor:
        """See `Layout`."""
        return transformer(inputs.x, inputs.t, inputs.y, return_dict=False)[0]

    def loaded_plainly(self, model: DynamicDepth, transformer: Any) -> tuple[tuple[str, ...], str]:
        """See `Layout`."""
        config = DiTConfig(**model.backbone.config())
        causes = ["timestep frequencies"] if config.frequency_shift != 1 else []
        if own_positions(model.backbone.state_dict()) is not None:
            causes.append("unrounded positions")
        match_frequencies(transformer, 1)
        transformer.pos_embed.pos_embed.copy_(position_features(*config.grid, config.width)[None])
        remedy = f"call dyndit.storage.names.match_frequencies(transformer, {config.frequency_shift}) after loading"
        return tuple(causes), remedy

    def _architecture(self, raw: Mapping[str, Any], path: Path) -> DiTConfig:
        for name, value in _FIXED.items():
            if raw.get(name, value) != value:
                raise CheckpointError(f"{path}: {name} is {raw[name]!r:.40}, expected {value!r}")
        sizes = checked_sizes(raw, _DEFAULTS, path)
        channels = sizes["in_channels"]
        out = raw.get("out_channels")
        if out not in (None, channels, 2 * channels):
            raise CheckpointError(f"{path}: out_channels is {out!r:.40}, expected {channels} or {2 * channels}")
        if sizes["sample_size"] > _MOST_PATCHES * sizes["patch_size"]:
            raise CheckpointError(
                f"{path}: sample_size is {sizes['sample_size']}, expected at most {_MOST_PATCHES} patches"
            )
        shift = private(raw, FREQUENCY_SHIFT, int, 1, path)
        norm_eps, dropout = raw.get("norm_eps", 1e-5), raw.get(LABEL_DROPOUT, 0.1)
        for name, value in (("norm_eps", norm_eps), (LABEL_DROPOUT, dropout)):
            if type(value) not in (int, float) or not 0 < value < 1:
                raise CheckpointError(f"{path}: {name} is {value!r:.40}, expected a number between 0 and 1")
        if shift not in (0, 1):
            raise CheckpointError(f"{path}: {FREQUENCY_SHIFT} is {shift}, expected 0 or 1")
        try:
            return DiTConfig(
                image_size=sizes["sample_size"],
                patch_size=sizes["patch_size"],
                in_channels=channels,
                width=sizes["num_attention_heads"] * sizes["attention_head_dim"],
                num_blocks=sizes["num_layers"],
                num_heads=sizes["num_attention_heads"],
                mlp_ratio=4.0,
                num_classes=sizes["num_embeds_ada_norm"],
                label_dropout=dropout,
                learn_variance=out == 2 * channels,
                norm_eps=_NORM_EPS,
                mlp_norm_eps=norm_eps,
                frequency_shift=shift,
            )
        except InputError as error:
            raise CheckpointError(f"{path}: impossible architecture ({error})") from error
