"""Exit heads turn the hidden state after a block into a prediction. Every head starts as the model's own final layer,
bit for bit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from dyndit.errors import InputError, expected_one_of
from dyndit.models.base import Backbone, State
from dyndit.models.layers import Mlp, modulate, zero_linear
from dyndit.models.recall import RATIO, Left, RecallHead

WIDEST = 8
"""Greatest width of a forecast's MLP, in multiples of the backbone's."""
HeadName = Literal["adaln-linear", "wide", "slim"]


@dataclass(frozen=True)
class ExitConfig:
    """Choose where exits stand, and their heads: `dyndit.ExitConfig(layers=(2, 4, 8), head="wide")`.

    layers: depths in 1..L-1 after which an exit stands. Empty: after every layer of a model of up to 16 blocks, after
    every fourth layer of a deeper model (`default_layers`).
    head: "wide" puts an MLP before a layer of the final layer's shape; earlier exits get a wider MLP (`hidden_ratio`).
    "slim" puts an MLP as wide as the backbone there, which no condition modulates: half of a wide exit's parameters.
    "adaln-linear", the plain head, has the shape of the model's final layer. All start as the model's final layer.
    recall: depths, some of the layers, whose forecasts ("4+") a second head learns (`dyndit.models.recall`). Those of
    the other depths extrapolate.
    recall_ratio: width of the MLP of such a head, in multiples of the backbone's.
    """

    layers: tuple[int, ...] = ()
    head: HeadName = "wide"
    recall: tuple[int, ...] = ()
    recall_ratio: int = RATIO

    def resolved(self, num_blocks: int) -> "ExitConfig":
        """Fill in the default layers. Raises InputError for a layer outside 1..L-1, or an unknown head."""
        layers = tuple(sorted(set(self.layers))) or default_layers(num_blocks)
        if not all(1 <= layer < num_blocks for layer in layers):
            raise InputError(f"exit layers {list(layers)}: expected depths in 1..{num_blocks - 1}")
        if self.head not in HEADS:
            raise InputError(f"exit head {self.head!r}: {expected_one_of(self.head, HEADS)}")
        if not set(self.recall) <= set(layers):
            raise InputError(f"exit recall {list(self.recall)}: expected some of the layers, {list(layers)}")
        if self.recall_ratio not in range(1, WIDEST + 1):  # a file may say anything, and memory is taken for it
            raise InputError(f"exit recall_ratio {self.recall_ratio}: expected 1 to {WIDEST}")
        return ExitConfig(layers, self.head, tuple(sorted(set(self.recall))), self.recall_ratio)


def default_layers(num_blocks: int) -> tuple[int, ...]:
    """Return every layer of a small model (up to 16 blocks), or every fourth layer of a deep model."""
    return tuple(range(1, num_blocks) if num_blocks <= 16 else range(4, num_blocks, 4))


class AdaLNLinear(nn.Module):
    """A head with the shape of the model's final layer, initialised as its copy."""

    def __init__(self, backbone: Backbone, depth: int) -> None:
        super().__init__()
        self.final = backbone.new_exit_head()

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D) -> (B, N, patch * patch * C_out)."""
        return self.final(tokens, cond)


class WideHead(nn.Module):
    """A hidden layer, then a layer with the shape of the model's final layer."""

    def __init__(self, backbone: Backbone, hidden: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.final = backbone.new_exit_head()  # first: both draw from the generator of first weights
        self.hidden = hidden().to(next(self.final.parameters()))

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D) -> (B, N, patch * patch * C_out)."""
        return self.final(self.hidden(tokens, cond), cond)


class HiddenLayer(nn.Module):
    """The MLP half of an adaLN block, ungated. It starts as the identity because its output map is zero."""

    def __init__(self, width: int, hidden: int, cond_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 2 * width))
        zero_linear(self.mlp.fc2)
        zero_linear(self.adaLN_modulation[-1])

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Add the MLP.  tokens: (B, N, D), cond: see `State` -> (B, N, D)."""
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        return tokens + self.mlp(modulate(self.norm(tokens), shift, scale))


class SlimLayer(nn.Module):
    """An MLP as wide as the tokens, after a layer norm of its own. It starts as the identity, as `HiddenLayer` does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, width)
        zero_linear(self.mlp.fc2)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Add the MLP.  tokens: (B, N, D); cond is not read, as the blocks have put it into the tokens -> (B, N, D)."""
        return tokens + self.mlp(self.norm(tokens))


def hidden_ratio(depth: int, num_blocks: int) -> int:
    """Return the width of a wide exit's MLP in multiples of D: 4 in the first third of the backbone, then 2, then 0.

    The widths are few because each width is compiled and timed by itself. torch compiles a forward for at most eight
    kinds of shapes. Each width takes three kinds: batches of one row, of a fixed number and of any number.
    """
    return 4 - 2 * (3 * (depth - 1) // (num_blocks - 1))


def wide_head(backbone: Backbone, depth: int) -> nn.Module:
    """Return the wide head after `depth` blocks, or a plain head if `hidden_ratio` is 0."""
    ratio = hidden_ratio(depth, backbone.num_blocks)
    if not ratio:
        return AdaLNLinear(backbone, depth)
    return WideHead(backbone, partial(HiddenLayer, backbone.width, ratio * backbone.width, backbone.cond_width))


def slim_head(backbone: Backbone, _depth: int) -> nn.Module:
    """Return the slim head, the same after every depth."""
    return WideHead(backbone, partial(SlimLayer, backbone.width))


HEADS: dict[str, Callable[[Backbone, int], nn.Module]] = {
    "adaln-linear": AdaLNLinear,
    "wide": wide_head,
    "slim": slim_head,
}
"""Builders of a head by name. A head maps (tokens (B, N, D), cond (B, D)) -> patches."""


class Exits(nn.Module):
    """The exit heads of one backbone, by depth. Raises InputError as `ExitConfig.resolved`."""

    def __init__(self, backbone: Backbone, config: ExitConfig) -> None:
        super().__init__()
        self.config = config.resolved(backbone.num_blocks)
        self.heads = nn.ModuleDict({str(layer): HEADS[config.head](backbone, layer) for layer in self.config.layers})
        ratio = self.config.recall_ratio
        self.recalls = nn.ModuleDict({str(layer): RecallHead(backbone, ratio) for layer in self.config.recall})
        self.gains: nn.Parameter | None
        self.register_parameter("gains", None)
        """Learned correction of forecasts, (E, 2, NUM_TERMS), or None (`dyndit.models.forecasts`)."""

    def gains_of(self, depth: int) -> Tensor | None:
        """Return the learned correction of this exit's forecasts, (2, NUM_TERMS), or None."""
        return None if self.gains is None else self.gains[self.layers.index(depth)]

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the depths at which an exit stands, rising."""
        return self.config.layers

    def patches(self, state: State, depth: int) -> Tensor:
        """Predict at the exit after `depth` blocks, as patches: (B, N, patch * patch * C_out)."""
        return self.heads[str(depth)](*state.for_head())

    def recalled(self, state: State, depth: int, left: Left, when: Tensor) -> Tensor:
        """Predict full depth from the state after `depth` blocks and from what a full-depth step left, as patches.

        when: `forecasts.basis` of both steps, (NUM_TERMS,) or (B, NUM_TERMS). -> (B, N, patch * patch * C_out)
        """
        tokens, cond = state.for_head()
        then, last = left.tokens[depth], left.tokens[max(left.tokens)]
        return self.recalls[str(depth)](tokens, cond, then, last, when)

    def alike(self) -> dict[int, int]:
        """Map each depth to the first depth whose head has the same shapes and therefore the same cost."""
        first: dict[object, int] = {}
        shapes = {d: tuple((n, p.shape) for n, p in self.heads[str(d)].named_parameters()) for d in self.layers}
        return {depth: first.setdefault(shapes[depth], depth) for depth in self.layers}

    def describe(self) -> dict[str, Any]:
        """Return plain data for the side-car's metadata. Without learned forecasts it does not speak of them."""
        config, usual = asdict(self.config), {"recall": (), "recall_ratio": RATIO}
        return {name: value for name, value in config.items() if name not in usual or value != usual[name]}
