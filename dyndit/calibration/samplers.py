"""How a calibration draws pictures: the protocol, and our own sampling."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

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
"""Far from the seeds 0, 1, ... that a result is scored on."""


ToPictures = Callable[[Tensor], Tensor]
"""(B, C, H, W) at the end of a sampling -> (B, C, H, W) uint8: `to_uint8`, or a decoder of latents."""


class Sampler(Protocol):
    """Draws pictures under plans, the same noise for the same picture number."""

    full: DepthPlan
    """Full depth at every step: the timesteps, the solver and the guidance scale that are calibrated."""
    depths: tuple[int, ...]
    identity: Identity
    """Of the model: what tables are bound to."""
    seed: int
    device: str
    setting: object
    """What else the pictures depend on, as plain data."""

    def replaced(
        self,
        indices: Sequence[int],
        bands: Sequence[Sequence[int]],
        choices: Sequence[Step],
        ages: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Draw the pictures of full depth; then, for each band and each choice, those with that band's steps replaced.

        A band is a run of neighbouring steps; bands may overlap, and come in any order. indices: B picture numbers ->
        (B, 1 or 3, H, W) uint8, 1 + bands * choices times. ages: `ages[i]`: steps since full depth for choice i; 0 if
        it does not forecast. Clipped to the first step; with no step before the band nothing is forecast. Empty where
        no choice forecasts.

        Raises:
            InputError: ages are given, and this sampler cannot forecast.
        """

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """Pictures under a plan, (N, 1 or 3, H, W) uint8: those that tables are measured on, or fresh ones."""

    def cost(self, batch_size: int) -> CostModel:
        """Seconds of the parts of a step, of `batch_size` pictures at a time."""

    def bind(self, table: ShiftTable) -> None:
        """Refuse a table of another model.

        Raises:
            InputError: naming both identities.
        """


@dataclass(frozen=True)
class OwnSampler:
    """Our own sampling: a trajectory forks where a band begins, so that nothing before it is run twice."""

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
        """As of `Sampler`."""
        return full_plan(self.model, self.solver, self.num_steps, self.cfg_scale)

    @property
    def depths(self) -> tuple[int, ...]:
        """As of `Sampler`."""
        return self.model.depths

    @property
    def identity(self) -> Identity:
        """As of `Sampler`."""
        return self.model.identity

    def bind(self, table: ShiftTable) -> None:
        """As of `Sampler`."""
        self.model.check_identity(table.backbone, table.exits, origin="shift table")

    @property
    def device(self) -> str:
        """As of `Sampler`."""
        return next(self.model.parameters()).device.type

    @property
    def setting(self) -> object:
        """As of `Sampler`."""
        return self.guided_channels

    def replaced(
        self,
        indices: Sequence[int],
        bands: Sequence[Sequence[int]],
        choices: Sequence[Step],
        ages: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """As of `Sampler`. Classes come in turn."""
        model, full, guidance = self.model, self.full, Guidance(self.cfg_scale, self.guided_channels)
        batch = batch_in_turn(model, indices, self.seed)
        kept = sorted({choice.depth for choice in choices if choice.forecast})
        # What a trajectory hands on stands before each step: forks share it, nobody writes to it.
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

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """As of `Sampler`: fresh pictures are those of the seed after the table's."""
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
        return result.pictures if self.model.pixel_space else self.to_pictures(result.latents)

    def cost(self, batch_size: int) -> CostModel:
        """As of `Sampler`."""
        return measure_cost(self.model, batch_size=batch_size, solver=self.solver, cfg_scale=self.cfg_scale)


def replaced_plan(full: DepthPlan, band: Sequence[int], choice: Step) -> DepthPlan:
    """Full depth, but for the steps of a band."""
    return full.with_steps([choice if k in band else step for k, step in enumerate(full.steps)])


def batches_of(numbers: range, size: int) -> list[range]:
    """The numbers in order, `size` at a time."""
    return [numbers[low : low + size] for low in range(0, len(numbers), size)]
