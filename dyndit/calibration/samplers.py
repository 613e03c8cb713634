"""Samplers that draw a calibration's pictures: the protocol, and dyndit's own sampling."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import Identity
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step
from dyndit.plans.table import ShiftTable
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import advance, batch_in_turn, full_plan, start, to_uint8
from dyndit.sampling.sample import sample
from dyndit.sampling.solvers import AnySolver
from dyndit.sampling.timing import measure_cost

CALIBRATION_SEED = 1_000_003
"""Default seed, far from the seeds 0, 1, ... that score a result."""

ToPictures = Callable[[Tensor], Tensor]
"""Convert the final state (B, C, H, W) -> (B, C, H, W) uint8: `to_uint8`, or a decoder of latents."""


class Sampler(Protocol):
    """Draws pictures under plans. The same picture number always has the same noise."""

    @property
    def full(self) -> Any:
        """The full plan, with the timesteps, the solver and the guidance scale to calibrate."""
        ...

    @property
    def depths(self) -> Any:
        """The depths that can be run, rising."""
        ...

    @property
    def identity(self) -> Any:
        """Identity of the model. Tables are bound to it."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the table's pictures."""
        ...

    @property
    def device(self) -> Any:
        """The kind of device."""
        ...

    @property
    def setting(self) -> Any:
        """Other settings that change the pictures, as plain data."""
        ...

    def replaced(
        self, indices: Sequence[int], bands: Sequence[Sequence[int]], choices: Sequence[Step], ages: Sequence[int] = ()
    ) -> Iterator[Tensor]:
        """Draw pictures at full depth; then, per band and choice, pictures with that band's steps replaced.

        A band is a run of neighbouring steps. Bands may overlap and come in any order. indices: B picture numbers ->
        (B, 1 or 3, H, W) uint8, 1 + bands * choices times. ages: `ages[i]`: steps since full depth for choice i; 0 if
        it does not forecast. Clipped to the first step. A band at the first step forecasts nothing. Empty if no choice
        forecasts.

        Raises InputError: ages are given, but this sampler cannot forecast.
        """
        ...

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """Draw the table's pictures or fresh pictures under a plan, (N, 1 or 3, H, W) uint8."""
        ...

    def cost(self, batch_size: int) -> CostModel:
        """Measure the seconds of the parts of a step for batches of `batch_size` pictures."""
        ...

    def bind(self, table: ShiftTable) -> None:
        """Refuse a table of another model. Raises InputError naming both identities."""


@dataclass(frozen=True)
class OwnSampler:
    """dyndit's own sampling. A trajectory forks at the start of a band, so that no earlier step runs twice."""

    model: DynamicDepth
    solver: AnySolver = "ddim"
    num_steps: int = 20
    cfg_scale: float = 1.5
    guided_channels: int | None = None
    to_pictures: ToPictures = to_uint8
    seed: int = CALIBRATION_SEED
    batch_size: int = 128

    @cached_property
    def full(self) -> DepthPlan:
        """See `Sampler`."""
        return full_plan(self.model, self.solver, self.num_steps, self.cfg_scale)

    @property
    def depths(self) -> tuple[int, ...]:
        """See `Sampler`."""
        return self.model.depths

    @property
    def identity(self) -> Identity:
        """See `Sampler`."""
        return self.model.identity

    def bind(self, table: ShiftTable) -> None:
        """See `Sampler`."""
        self.model.check_identity(table.backbone, table.exits, origin="shift table")

    @property
    def device(self) -> str:
        """See `Sampler`."""
        return next(self.model.parameters()).device.type

    @property
    def setting(self) -> object:
        """See `Sampler`."""
        return self.guided_channels

    def replaced(
        self, indices: Sequence[int], bands: Sequence[Sequence[int]], choices: Sequence[Step], ages: Sequence[int] = ()
    ) -> Iterator[Tensor]:
        """See `Sampler`. Classes come in turn."""
        model, full, guidance = self.model, self.full, Guidance(self.cfg_scale, self.guided_channels)
        batch = batch_in_turn(model, indices, self.seed)
        kept = sorted({choice.depth for choice in choices if choice.forecast})
        # Keep the trajectory before each step. Forks share its memory, and no step writes to it.
        before, trajectory = [], start(model, batch, self.solver, self.num_steps)
        firsts = {band[0] for band in bands}
        for k in range(self.num_steps):
            before.append(trajectory.fork() if k in firsts else replace(trajectory, scheduler=None, x=None))
            advance(model, batch, trajectory, full, guidance, first=k, stop=k + 1, also_keep=kept)
        yield self.to_pictures(trajectory.x).cpu()
        for band in bands:
            for choice, age in zip(choices, ages or [0] * len(choices), strict=True):
                fork = before[band[0]].fork()
                if choice.forecast and band[0]:
                    fork.memory = before[max(1, band[0] + 1 - age)].memory
                elif choice.forecast:
                    choice = replace(choice, forecast=False)
                end = advance(model, batch, fork, replaced_plan(full, band, choice), guidance, first=band[0])
                yield self.to_pictures(end.x).cpu()

    def variations(self, indices: Sequence[int], plan: DepthPlan, others: Sequence[DepthPlan]) -> Iterator[Tensor]:
        """Draw pictures under a plan, then under each other plan from its first changed step on. Classes come in turn.

        indices: B picture numbers -> (B, 1 or 3, H, W) uint8, 1 + len(others) times, bit for bit as each plan alone
        draws them. others: plans of the same timesteps.
        """
        model, guidance = self.model, Guidance(self.cfg_scale, self.guided_channels)
        batch = batch_in_turn(model, indices, self.seed)
        firsts = [first_change(plan, other) for other in others]
        kept = sorted({step.depth for other in others for step in other.steps if step.forecast})
        before, trajectory = {}, start(model, batch, self.solver, self.num_steps)
        for k in range(self.num_steps):
            if k in firsts:
                before[k] = trajectory.fork()
            advance(model, batch, trajectory, plan, guidance, first=k, stop=k + 1, also_keep=kept)
        yield self.to_pictures(trajectory.x).cpu()
        for other, first in zip(others, firsts, strict=True):
            if first == self.num_steps:  # the same plan
                yield self.to_pictures(trajectory.x).cpu()
                continue
            end = advance(model, batch, before[first].fork(), other, guidance, first=first)
            yield self.to_pictures(end.x).cpu()

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """See `Sampler`. Fresh pictures use the seed after the table's seed."""
        result = sample(
            self.model,
            self.model.backbone.condition.in_turn(num_pictures),
            plan=plan,
            solver=self.solver,
            num_steps=self.num_steps,
            cfg_scale=self.cfg_scale,
            guided_channels=self.guided_channels,
            seed=self.seed + fresh,
            batch_size=self.batch_size,
        )
        return result.pictures if result.latents is None else self.to_pictures(result.latents)

    def cost(self, batch_size: int) -> CostModel:
        """See `Sampler`."""
        return measure_cost(self.model, batch_size=batch_size, solver=self.solver, cfg_scale=self.cfg_scale)


def first_change(plan: DepthPlan, other: DepthPlan) -> int:
    """Return the first step at which two plans differ; the number of steps if they do not."""
    pairs = zip(plan.steps, other.steps, strict=True)
    return next((k for k, (one, two) in enumerate(pairs) if one != two), plan.num_steps)


def replaced_plan(full: DepthPlan, band: Sequence[int], choice: Step) -> DepthPlan:
    """Replace the steps of a band in the full plan."""
    return full.with_steps([choice if k in band else step for k, step in enumerate(full.steps)])


def batches_of(numbers: range, size: int) -> list[range]:
    """Split the numbers in order into batches of `size`."""
    return [numbers[low : low + size] for low in range(0, len(numbers), size)]
