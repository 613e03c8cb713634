"""Exit heads: what turns the hidden state after a layer into a prediction."""

from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor, nn

from dyndit.backbones import Backbone, State
from dyndit.errors import InputError

HeadName = Literal["adaln-linear", "block"]


@dataclass(frozen=True)
class ExitConfig:
    """Where exits stand and what they are.

    layers: depths in 1..L-1 after which an exit stands; empty means the default (`default_layers`).
    head: "adaln-linear" is the shape of the model's final layer and starts as its copy; "block" puts one light
    transformer block (MLP ratio 1) before it.
    """

    layers: tuple[int, ...] = ()
    head: HeadName = "adaln-linear"

    def resolved(self, num_blocks: int) -> "ExitConfig":
        """Fill in the default layers and check the given ones.

        Raises:
            InputError: a layer outside 1..L-1, or an unknown head.
        """
        layers = tuple(sorted(set(self.layers))) or default_layers(num_blocks)
        if not all(1 <= layer < num_blocks for layer in layers):
            raise InputError(f"exit layers {list(layers)}: expected depths in 1..{num_blocks - 1}")
        if self.head not in HEADS:
            raise InputError(f"exit head {self.head!r}: expected one of {', '.join(HEADS)}")
        return ExitConfig(layers, self.head)


def default_layers(num_blocks: int) -> tuple[int, ...]:
    """Every layer of a small model (up to 16 blocks), every fourth of a deep one."""
    return tuple(range(1, num_blocks) if num_blocks <= 16 else range(4, num_blocks, 4))


class AdaLNLinear(nn.Module):
    """The shape of the model's final layer, initialised as its copy."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.final = backbone.new_exit_head()

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """tokens: (B, N, D), cond: (B, D) -> (B, N, patch * patch * C_out)."""
        return self.final(tokens, cond)


class BlockHead(nn.Module):
    """One light block, then the final layer's shape. Starts equal to `AdaLNLinear`: the block is gated by zero."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.block = backbone.new_exit_block()
        self.final = backbone.new_exit_head()

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """tokens: (B, N, D), cond: (B, D) -> (B, N, patch * patch * C_out)."""
        return self.final(self.block(tokens, cond), cond)


HEADS: dict[str, type[nn.Module]] = {"adaln-linear": AdaLNLinear, "block": BlockHead}


class Exits(nn.Module):
    """The exit heads of one trunk, by depth."""

    def __init__(self, backbone: Backbone, config: ExitConfig) -> None:
        super().__init__()
        self.config = config.resolved(backbone.num_blocks)
        self.heads = nn.ModuleDict({str(layer): HEADS[config.head](backbone) for layer in self.config.layers})

    @property
    def layers(self) -> tuple[int, ...]:
        """Depths at which an exit stands, rising."""
        return self.config.layers

    def patches(self, state: State, depth: int) -> Tensor:
        """The prediction of the exit after `depth` blocks, as patches: (B, N, patch * patch * C_out)."""
        return self.heads[str(depth)](state.tokens, state.cond)

    def describe(self) -> dict[str, object]:
        """Plain data for the side-car's metadata."""
        return asdict(self.config)
