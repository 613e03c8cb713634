"""Measure the cost of the parts of a step on this machine."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch

from dyndit.clock import Clock
from dyndit.models.base import Backbone, Inputs, State
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.recall import Left
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.rounds import paired_times
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start
from dyndit.sampling.solvers import AnySolver


def measure_cost(
    model: DynamicDepth,
    *,
    batch_size: int = 64,
    solver: AnySolver | None = None,
    cfg_scale: float = 1.5,
    rounds: int = 7,
) -> CostModel:
    """Time the parts of our own sampling step: medians over `rounds`. The parts alternate."""
    backbone, first = model.backbone, next(model.parameters())
    solver = solver or model.process.usual_solver

    def some(rows: int) -> Inputs:
        return backbone.example(rows, torch.Generator().manual_seed(0)).to(first)

    plan, guidance = full_plan(model, solver, 5, cfg_scale), Guidance(cfg_scale)
    condition = backbone.condition.of(backbone.condition.in_turn(batch_size), first.device)
    batch = Batch(condition, tuple(range(batch_size)), seed=0)
    # Prepare the trajectories ahead: drawing the noise is not part of a step.
    waiting = [start(model, batch, solver, 5) for _ in range(rounds + 1)]

    def draw() -> list[float]:
        rest: list[float] = []
        on_step = lambda _, seconds, network: rest.append(seconds - network)  # noqa: E731
        advance(model, batch, waiting.pop(), plan, guidance, on_step=on_step)
        return rest

    return measure_parts(model, some(batch_size), some(2 * batch_size), draw, rounds=rounds)


@torch.no_grad()  # not inference mode: training may use tensors that a pipeline's modules keep from `draw`
def measure_parts(
    model: DynamicDepth, one: Inputs, two: Inputs | None, draw: Callable[[], Sequence[float]], *, rounds: int
) -> CostModel:
    """Time the parts on given calls: medians over `rounds`. In each round the parts and a whole sampling alternate.

    one: the B rows of a branch; two: the 2B rows of both branches, or None if they run one after the other. draw:
    sample once -> the seconds of every step outside the network.
    """
    backbone, device = model.backbone, one.x.device
    first_alike = model.exits.alike() if model.exits is not None else {}
    recall = model.exits.config.recall if model.exits is not None else ()
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
        for depth in recall:
            left = Left(0.0, dict.fromkeys((depth, model.num_blocks), state.for_head()[0]))
            parts[f"{name}.recall.{depth}"] = lambda depth=depth, left=left: model.recalled(state, depth, left, 0.0)
        parts[f"{name}.head"] = lambda: backbone.head(state)

    add("one", one)
    if two is not None:
        add("two", two)
    draws: list[Sequence[float]] = []
    parts["steps"] = lambda: draws.append(draw())
    timed = paired_times(parts, rounds=rounds, warmup=1, clock=Clock(device), title="timing the parts of a step")
    seconds = timed.groupby("arm")["seconds"].median().to_dict()
    rest = [step for measured in draws[1:] for step in measured]  # the first draw warms up

    def times(name: str, factor: int = 1) -> PartTimes:
        embed, head = (factor * seconds[f"{name}.{part}"] for part in ("embed", "head"))
        blocks = tuple(factor * seconds[f"{name}.blocks.{kind}"] / kinds.count(kind) for kind in kinds)
        block = sum(blocks) / len(blocks)
        leave = {depth: factor * seconds[f"{name}.exit.{depth}"] for depth in exits}
        others = {depth: leave[first] for depth, first in first_alike.items() if first != shallowest}
        recalls = {depth: factor * seconds[f"{name}.recall.{depth}"] for depth in recall}
        return PartTimes(embed, block, leave[shallowest], head, others, blocks if len(set(kinds)) > 1 else (), recalls)

    both = times("one", 2) if two is None else times("two")
    # A pipeline of one step has no time between calls.
    solver = statistics.median(rest) if rest else 0.0
    return CostModel(len(one), model.num_blocks, times("one"), both, solver, device.type)


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
