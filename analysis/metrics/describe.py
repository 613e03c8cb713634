"""Describe a model in figures that need no run: sizes, tokens, arithmetic at each exit, estimated time and memory."""

import time
from dataclasses import asdict, dataclass, replace

import torch

from dyndit.analysis.metrics.macs import flops, model_macs
from dyndit.analysis.metrics.memory import estimated_memory
from dyndit.models.dit import CARDS
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel
from dyndit.plans.step import Step


@dataclass(frozen=True)
class AtDepth:
    """One pass of one picture that leaves after `depth` blocks.

    parameters: weights that the pass reads. milliseconds: estimated, see `Description.timed_by`.
    """

    depth: int
    parameters: int
    macs: int
    flops: int
    share: float
    milliseconds: float


@dataclass(frozen=True)
class Description:
    """A model's figures. Guidance by a second pass takes two rows a picture."""

    name: str
    family: str
    process: str
    sample_shape: tuple[int, ...]
    tokens: int
    width: int
    parameters: int
    """Parameters of the backbone."""
    exit_parameters: int
    depths: tuple[AtDepth, ...]
    dtype: str
    weights_bytes: int
    """Bytes of backbone and exits in `dtype`."""
    call_bytes: int
    """Most bytes that one full-depth call of `rows` rows holds beside the weights."""
    rows: int
    training_bytes: int
    """Bytes of weights, gradients, two moments of AdamW and the average, in float32; activations not included."""
    timed_by: str
    """Origin of the times: a rate of products, or the measured times of the model's table."""

    def record(self) -> dict[str, object]:
        """Return plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the figures as printed."""
        shape = " x ".join(map(str, self.sample_shape))
        exits = f", exits {_count(self.exit_parameters)} more" if self.exit_parameters else ""
        text = [
            f"{self.name}: {self.family}, {self.process}, samples of {shape}",
            f"parameters: {_count(self.parameters)}{exits}",
            f"tokens: {self.tokens} of width {self.width}",
            f"one pass of one picture (a second pass guides); time: {self.timed_by}",
            "depth  parameters     GMACs    GFLOPs   share        ms",
        ]
        text += [
            f"{d.depth:5d}  {_count(d.parameters):>10}  {d.macs / 1e9:8.4g}  {d.flops / 1e9:8.4g}  {d.share:6.1%}"
            f"  {d.milliseconds:8,.2f}"
            for d in self.depths
        ]
        parts = f"weights {_bytes(self.weights_bytes)}, a call of {self.rows} rows {_bytes(self.call_bytes)} more"
        training = f"training {_bytes(self.training_bytes)} before activations (AdamW and average, float32)"
        return [*text, f"memory ({self.dtype}), estimated: {parts}; {training}"]


def outline(card: str, exits: ExitConfig | None = None, **changes: object) -> DynamicDepth:
    """Build a card's model without weights, on the meta device.

    exits: default exits if None. changes: other fields of its config, for example conditioning="adaln".

    Raises:
        InputError: an exit after a missing layer, or an impossible config.
    """
    config = replace(CARDS[card], **changes)
    with torch.device("meta"):
        backbone = config.build()
        return DynamicDepth(
            backbone, Exits(backbone, exits or ExitConfig()), pixel_space=config.in_channels in (1, 3)
        ).eval()


def describe(
    name: str,
    model: DynamicDepth,
    *,
    rows: int = 1,
    dtype: torch.dtype | None = None,
    rate: float | None = None,
    cost: CostModel | None = None,
) -> Description:
    """Describe a model, which may be on the meta device.

    rows: rows of the call whose memory is estimated. dtype: default the weights' own. rate: FLOP/s that times are
    estimated with (default: this machine's rate of matrix products). cost: measured times of this model, used instead.
    """
    dtype, macs = dtype or next(model.parameters()).dtype, model_macs(model)
    if cost is not None:
        timed_by = f"measured parts, batches of {cost.batch_size} on {cost.device}"
    elif rate is None:
        rate = products_per_second(model.backbone.width, dtype)
        timed_by = f"at least, at {rate / 1e9:,.0f} GFLOP/s, this machine's products of matrices"
    else:
        timed_by = f"at least, at {rate / 1e9:,.0f} GFLOP/s as given"

    def milliseconds(depth: int) -> float:
        if cost is not None:
            return 1e3 * (cost.step_seconds(Step(depth)) - cost.solver) / cost.batch_size
        return 1e3 * flops(macs.branch(depth)) / rate

    whole, size = _size(model), torch.empty(0, dtype=dtype).element_size()
    return Description(
        name,
        model.backbone.family,
        str(model.process),
        tuple(model.backbone.sample_shape),
        macs.tokens,
        model.backbone.width,
        _size(model.backbone),
        whole - _size(model.backbone),
        tuple(
            AtDepth(
                depth,
                _read(model, depth),
                macs.branch(depth),
                flops(macs.branch(depth)),
                macs.branch(depth) / macs.full,
                milliseconds(depth),
            )
            for depth in model.depths
        ),
        str(dtype).removeprefix("torch."),
        whole * size,
        estimated_memory(model, rows, dtype),
        rows,
        5 * 4 * _size(model.backbone),
        timed_by,
    )


def products_per_second(width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Measure the FLOP/s of a product like a DiT's MLP: 256 rows by (width, 4 width). The best of five."""
    x, w = torch.ones(256, width, dtype=dtype, device=device), torch.ones(width, 4 * width, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (x @ w)[0, 0].item()
        times.append(time.perf_counter() - began)
    return flops(256 * width * 4 * width) / min(times[1:])


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _read(model: DynamicDepth, depth: int) -> int:
    """Count the parameters that a pass to `depth` reads: not later blocks, other heads."""
    later = sum(map(_size, model.backbone.block_modules()[depth:]))
    if depth == model.num_blocks:
        return _size(model.backbone)
    with next(model.parameters()).device:
        own_head = _size(model.backbone.new_exit_head())
    return _size(model.backbone) - later - own_head + _size(model.exits.heads[str(depth)])


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.1f} MiB"
