"""Measure the cost of the parts of a step on this machine."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch

from dyndit.clock import Clock
from dyndit.models.base import Backbone, Inputs, State
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.schedules import constant
from dyndit.plans.step import Step
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start
from dyndit.sampling.solvers import AnySolver
from dyndit.stats import paired_times


@dataclass(frozen=True)
class CallTimes:
    """Seconds of a sampling step, by call of the network: inside the network, both branches, and outside."""

    network: float
    outside: float


def measure_cost(
    model: DynamicDepth, *, batch_size: int = 64, solver: AnySolver = "ddim", cfg_scale: float = 1.5, rounds: int = 7
) -> CostModel:
    """Time the parts of our own sampling step: medians over `rounds`. The parts alternate."""
    backbone, first = model.backbone, next(model.parameters())

    def some(rows: int) -> Inputs:
        return backbone.example(rows, torch.Generator().manual_seed(0)).to(first)

    full, guidance = full_plan(model, solver, 5, cfg_scale), Guidance(cfg_scale)
    condition = backbone.condition.of(backbone.condition.in_turn(batch_size), first.device)
    batch = Batch(condition, tuple(range(batch_size)), seed=0)
    # Prepare the trajectories ahead: drawing the noise is not part of a step.
    waiting = [start(model, batch, solver, 5) for _ in range(2 * (rounds + 1))]

    def draw(depth: int) -> list[CallTimes]:
        plan = constant(full, model.depths, depth)
        found: list[CallTimes] = []

        def note(step: int, seconds: float, network: float) -> None:
            calls = plan.calls_by_step[step]
            found.append(CallTimes(network / calls, (seconds - network) / calls))

        advance(model, batch, waiting.pop(), plan, guidance, on_step=note)
        return found

    branches = 1 if guidance.scale == 1 else 2
    return measure_parts(model, some(batch_size), some(2 * batch_size), draw, branches=branches, rounds=rounds)


@torch.no_grad()  # not inference mode: training may use tensors that a pipeline's modules keep from `draw`
def measure_parts(
    model: DynamicDepth,
    one: Inputs,
    two: Inputs | None,
    draw: Callable[[int], Sequence[CallTimes]],
    *,
    branches: int,
    rounds: int,
) -> CostModel:
    """Time the parts on given calls: medians over `rounds`. In each round the parts and a whole sampling alternate.

    A part alone is not what it is in a step: it finds its weights in the caches, and a call has a cost of its own. So
    blocks and heads are scaled by one factor, and a constant is added to the embedding, such that the parts add up to
    what the network takes in real steps at full depth and at the shallowest depth.

    one: the B rows of a branch; two: the 2B rows of both branches, or None if they run one after the other. draw:
    sample once, 1 or 2 `branches` at a constant depth -> the seconds of every step.
    """
    backbone, device = model.backbone, one.x.device
    first_alike = model.exits.alike() if model.exits is not None else {}
    shallowest = model.depths[0]  # L without exits
    exits = sorted({shallowest, *first_alike.values()})
    names = backbone.block_kinds()
    kinds = [names.index(name) for name in names]  # each kind is known by its first block
    parts: dict[str, Callable[[], object]] = {}

    def add(name: str, inputs: Inputs) -> None:
        state = backbone.embed(inputs.x, inputs.t, inputs.y)

        parts[f"{name}.embed"] = lambda: backbone.embed(inputs.x, inputs.t, inputs.y)
        for kind, run in _runs(backbone, kinds, state).items():
            parts[f"{name}.blocks.{kind}"] = run
        for depth in exits:
            parts[f"{name}.exit.{depth}"] = lambda depth=depth: model.leave(state, depth)
        parts[f"{name}.head"] = lambda: backbone.head(state)

    add("one", one)
    if two is not None:
        add("two", two)
    draws: dict[int, list[Sequence[CallTimes]]] = {depth: [] for depth in {model.num_blocks, shallowest}}
    for depth in draws:
        parts[f"steps.{depth}"] = lambda depth=depth: draws[depth].append(draw(depth))
    timed = paired_times(parts, rounds=rounds, warmup=1, clock=Clock(device), title="timing the parts of a step")
    seconds = timed.groupby("arm")["seconds"].median().to_dict()
    # The first draw of each depth warms up.
    steps = {depth: [step for measured in some[1:] for step in measured] for depth, some in draws.items()}

    def times(name: str, factor: int = 1) -> PartTimes:
        embed, head = (factor * seconds[f"{name}.{part}"] for part in ("embed", "head"))
        blocks = tuple(factor * seconds[f"{name}.blocks.{kind}"] / kinds.count(kind) for kind in kinds)
        block = sum(blocks) / len(blocks)
        leave = {depth: factor * seconds[f"{name}.exit.{depth}"] for depth in exits}
        others = {depth: leave[first] for depth, first in first_alike.items() if first != shallowest}
        return PartTimes(embed, block, leave[shallowest], head, others, blocks if len(set(kinds)) > 1 else ())

    alone = {"one": times("one"), "two": times("one", 2) if two is None else times("two")}
    solver = statistics.median([step.outside for step in steps[model.num_blocks]] or [0.0])
    bare = CostModel(len(one), model.num_blocks, alone["one"], alone["two"], 0.0, device.type)
    real = {depth: statistics.median([step.network for step in some]) for depth, some in steps.items() if some}
    found = {depth: bare.step_seconds(Step.equal(depth, branches == 2)) for depth in real}
    return replace(bare, solver=solver, **_fitted(alone, found, real, calls=2 if branches == 2 and two is None else 1))


def _fitted(
    parts: Mapping[str, PartTimes], alone: Mapping[int, float], real: Mapping[int, float], calls: int
) -> dict[str, PartTimes]:
    """Fit parts to real steps of 1 or 2 `calls`.

    alone, real: seconds by depth, of the parts' sum and of the network in real steps.
    """
    if not real or min(alone.values()) <= 0:
        return dict(parts)
    deep, shallow = max(real), min(real)
    rise = alone[deep] - alone[shallow]
    factor = (real[deep] - real[shallow]) / rise if rise > 0 else real[deep] / alone[deep]
    factor = factor if factor > 0 else 1.0
    rest = real[deep] - factor * alone[deep]

    def fit(times: PartTimes, rest: float) -> PartTimes:
        return PartTimes(
            max(0.0, factor * times.embed + rest),
            factor * times.block,
            factor * times.exit,
            factor * times.head,
            {depth: factor * seconds for depth, seconds in times.exits.items()},
            tuple(factor * seconds for seconds in times.blocks),
        )

    return {"one": fit(parts["one"], rest / calls), "two": fit(parts["two"], rest)}


def _runs(backbone: Backbone, kinds: Sequence[int], state: State) -> dict[int, Callable[[], None]]:
    """Return what runs all blocks of a kind, for each kind. Each series of them begins with the state before it."""
    series: dict[int, list[tuple[State, list[int]]]] = {}
    for kind, indices in groupby(range(len(kinds)), kinds.__getitem__):
        several = list(indices)
        series.setdefault(kind, []).append((state, several))
        for index in several:
            state = backbone.block(index, state)

    def run(kind: int) -> None:
        for first, several in series[kind]:
            out = first
            for index in several:
                out = backbone.block(index, out)

    return {kind: partial(run, kind) for kind in series}
