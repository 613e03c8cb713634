"""The adapter: a `Backbone` over a transformer of diffusers that belongs to the user.

Below it stand parts that several families share: exit heads in the shape of final layers, and joining patches.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn
from torch.nn.functional import silu

from dyndit.errors import InputError
from dyndit.models.base import Backbone, Inputs, PerRow
from dyndit.models.conditions import Conditioning, GivenRows
from dyndit.plugin.weights import added_scales, added_tensors, own_tensors


class Adapter(Backbone):
    """A transformer of diffusers, cut into embed, blocks and head. Its modules and weights do not change.

    A family defines `embed`, `block`, `head`, `new_exit_head` and `unpatchify`. The class variables below describe how
    its pipelines call the transformer. `embed` gets the output of `read`.
    """

    family: ClassVar[str]
    """Name of the diffusers class that the adapter serves."""
    foreign = True
    latents_arguments: ClassVar[tuple[str, ...]] = ("hidden_states",)
    """Arguments of the forward that hold the latents."""
    timestep_argument: ClassVar[str] = "timestep"
    row_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the forward with the batch first, except latents and timestep. An argument may be a dictionary of
    such tensors; the adapter gets its entries by their own names. Residuals of a ControlNet, a list or a dictionary by
    block, are read as entries `name.0`, `name.1`, ...; `in_order` puts them together again."""
    shared_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the forward that serve the whole batch."""
    guidance: ClassVar[Literal["cond first", "uncond first", "calls"]] = "uncond first"
    """Position of the unconditional rows in a guided call: "cond first": second half of the batch; "uncond first":
    first half; "calls": a second call on the same latents."""
    timestep_per_token: ClassVar[bool] = False
    """True if a call may have a timestep per token, (B, N): tokens of a given frame have a lower one. The largest is
    the step's."""
    timestep_scale: float = 1.0
    """The scheduler's timestep as a multiple of the forward's timestep."""

    condition = GivenRows()
    transformer: Any
    """The transformer of diffusers, an nn.Module. `Any`, because its parts have no types."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self._signature = inspect.signature(type(transformer).forward)

    def read(self, *args: Any, **kwargs: Any) -> Inputs:
        """Convert the arguments of a transformer call to `Inputs`.

        Raises:
            InputError: an argument that this adapter does not know, such as a ControlNet's residuals, or no timestep.
        """
        try:
            call = self._signature.bind(self.transformer, *args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"{self.family}: {error}") from error
        timestep = self.timestep_argument
        known = ("self", timestep, "return_dict", *self.latents_arguments)
        known = (*known, *self.row_arguments, *self.shared_arguments)
        for name, value in call.items():
            if name not in known and not self._says_nothing(name, value):
                raise InputError(f"{self.family}: called with {name}, which cannot be combined with exits")
        if call.get(timestep) is None:
            raise InputError(f"{self.family}: called without {timestep}, which depth depends on")
        x = self._latents(call)
        t = torch.as_tensor(call[timestep], device=x.device)
        t = t.amax(dim=1) if t.ndim == 2 and self.timestep_per_token else t.reshape(-1)
        if len(t) not in (1, len(x)):
            raise InputError(f"{self.family}: called with {len(t)} timesteps for {len(x)} rows, which depth depends on")
        inputs = Inputs(x, t.expand(len(x)).contiguous(), self._condition(call))
        self._check_residuals(inputs)
        return inputs

    def _check_residuals(self, inputs: Inputs) -> None:
        """Refuse residuals of other rows: both branches need theirs."""
        for name, value in inputs.y.rows.items() if isinstance(inputs.y, Conditioning) else ():
            if "." in name and len(value) != len(inputs):
                raise InputError(
                    f"{self.family}: called with {len(value)} rows of {name.partition('.')[0]}, expected {len(inputs)} "
                    "as of the latents"
                )

    def _latents(self, call: dict[str, Any]) -> Tensor:
        """Return the latents of a bound call as one tensor, the batch first."""
        return call["hidden_states"]

    def scheduler_timestep(self, t: float) -> float:
        """Convert a timestep of the forward to the scheduler's timestep."""
        return t * self.timestep_scale

    def _says_nothing(self, name: str, value: object) -> bool:
        """Return True if an argument has its default value or is empty."""
        default = self._signature.parameters[name].default
        return value is None or value is default or (isinstance(value, Mapping) and not value)

    def _condition(self, call: dict[str, Any]) -> Any:
        """Return the conditioning of a bound call."""
        rows: dict[str, Tensor] = {}
        for name in self.row_arguments:
            value = call.get(name)
            entries: Any = dict(enumerate(value)) if isinstance(value, list | tuple) else value
            entries = entries if isinstance(entries, Mapping) else {name: value}
            named = {f"{name}.{key}" if isinstance(key, int) else key: entry for key, entry in entries.items()}
            rows |= {key: entry for key, entry in named.items() if entry is not None}
        return Conditioning(rows, {name: call[name] for name in self.shared_arguments if call.get(name) is not None})

    def is_guided(self, inputs: Inputs) -> bool | None:
        """Return False if the batch of a call cannot hold both guidance branches; None if its rows do not tell.

        Pipelines stack both branches on the same latents, so unequal halves are one branch. Equal halves may be two
        pictures of one seed.
        """
        half = len(inputs) // 2
        if self.guidance == "calls":
            return None
        return None if len(inputs) == 2 * half and torch.equal(inputs.x[:half], inputs.x[half:]) else False

    def output(self, prediction: Any, inputs: Inputs, return_dict: bool) -> Any:
        """Wrap the prediction for `inputs` as the transformer's forward returns it."""
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def tensors(self) -> dict[str, Tensor]:
        """Return the transformer's own weights, and those of low-rank adapters that count in a call."""
        return own_tensors(self.transformer) | added_tensors(self.transformer)

    def unseen(self) -> dict[str, Any]:
        """Return the transformer's whole configuration, and the scales of low-rank adapters that count in a call."""
        return (
            {"class": self.family}
            | self._added()
            | {
                name: value
                for name, value in sorted(self.transformer.config.items())
                if not name.startswith("_") and isinstance(value, bool | int | float | str | tuple | list)
            }
        )

    def _added(self) -> dict[str, Any]:
        scales = added_scales(self.transformer)
        return {"adapters": scales} if scales else {}


def in_order(y: Conditioning, name: str) -> PerRow | None:
    """Return the residuals of a ControlNet that were passed as argument `name`; None without them."""
    found = {key: value for key, value in y.rows.items() if key.startswith(f"{name}.")}
    samples = sorted(found, key=lambda key: int(key.rpartition(".")[2]))
    return PerRow(tuple(found[key] for key in samples)) if samples else None


class ContinuousHead(nn.Module):
    """The final layer of SD3, FLUX, Qwen-Image and Hunyuan: a norm, then a linear map. A map of the conditioning
    gives the norm's shift and scale. The head starts as a copy of the model's own."""

    def __init__(self, norm_out: AdaLayerNormContinuous, proj_out: nn.Linear) -> None:
        super().__init__()
        check_copies(norm_out.linear)
        widths = (proj_out.in_features, norm_out.linear.in_features)
        options: dict[str, Any] = {"eps": norm_out.norm.eps, "bias": norm_out.linear.bias is not None}
        self.norm_out = AdaLayerNormContinuous(*widths, elementwise_affine=False, **options)
        self.norm_out.load_state_dict(norm_out.state_dict())
        self.proj_out = linear_copy(proj_out)
        self.to(proj_out.weight)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D) -> (B, N, patch * patch * C_out)."""
        return self.proj_out(self.norm_out(tokens, cond))


class ScaleHead(nn.Module):
    """The final layer of Lumina 2 and Z-Image: a norm, then a linear map. A linear map of the conditioning gives the
    norm's scale. The head starts as a copy of the model's own."""

    def __init__(self, norm: nn.LayerNorm, modulation: nn.Linear, proj_out: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(proj_out.in_features, eps=norm.eps, elementwise_affine=False)
        self.modulation, self.proj_out = linear_copy(modulation), linear_copy(proj_out)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D_cond) -> (B, N, patch * patch * C_out)."""
        scale = self.modulation(silu(cond).to(tokens.dtype))
        return self.proj_out(self.norm(tokens) * (1 + scale)[:, None])


class TableHead(nn.Module):
    """The final layer of PixArt, Latte, Sana, Wan and LTX-2: a norm, then a linear map. The conditioning plus a learned
    table gives the norm's shift and scale ("adaLN-single", Chen et al. 2023, arXiv:2310.00426, Sec. 2.3). The head
    starts as a copy of the model's own."""

    def __init__(self, norm_out: nn.LayerNorm, scale_shift_table: Tensor, proj_out: nn.Linear) -> None:
        super().__init__()
        self.norm_out = nn.LayerNorm(list(norm_out.normalized_shape), eps=norm_out.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(scale_shift_table.detach().clone())
        self.proj_out = linear_copy(proj_out)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D) or (B, N, D) -> (B, N, patch * patch * C_out)."""
        shift, scale = shift_and_scale(self.scale_shift_table, cond)
        return self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)


def shift_and_scale(table: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
    """Add the conditioning to a learned table.

    table: (2, D), cond: (B, D) or, with a timestep per token, (B, N, D) -> two tensors (B, 1, D) or (B, N, D).
    """
    shift, scale = (table + cond.unsqueeze(-2)).unbind(-2)
    return (shift, scale) if cond.ndim == 3 else (shift[:, None], scale[:, None])


def check_copies(linear: nn.Linear) -> None:
    """Refuse a quantised layer of the head, because an exit starts as a trainable copy of it.

    Raises:
        InputError: naming the kind of its weight.
    """
    weight = linear.weight.data
    if type(weight) is not Tensor or not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.") if type(weight) is Tensor else type(weight).__name__
        raise InputError(f"transformer: its head is quantised; expected floating-point weights, not {kind}")


def linear_copy(linear: nn.Linear) -> nn.Linear:
    """Return a trainable copy on the same device, in the same precision."""
    check_copies(linear)
    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    copy.load_state_dict(linear.state_dict())
    return copy.to(linear.weight)


def join_patches(patches: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Join patches: (B, rows * columns, patch * patch * C) -> (B, C, rows * patch, columns * patch)."""
    grid = patches.reshape(len(patches), rows, columns, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch, columns * patch)


def first_image(ids: Tensor) -> int:
    """Count the tokens of the picture, which are all unless reference images follow.

    A picture's positions begin with 0. Those of a reference image begin with another number, and start anew.
    ids: (N + R, 3 or 4), the positions of all images' tokens. Example: (0, 0, 0), (0, 0, 1), (1, 0, 0) has a picture of
    two tokens.
    """
    numbers = ids.cpu()
    others = numbers[:, 0].nonzero()
    first = int(others[0]) if len(others) else 0
    return first if first and torch.equal(numbers[first, 1:], numbers[0, 1:]) else len(ids)


def attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a mask (B, N), 1 keep and 0 drop, into a bias on attention scores, (B, 1, N). Return a bias unchanged."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0)[:, None]
