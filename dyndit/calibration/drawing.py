"""How pictures are drawn for a calibration: by our own sampling, or by a user's pipeline with the plug-in on it."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dyndit.errors import InputError
from dyndit.models import Inputs
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.cost import CostModel, measure_cost, measure_parts
from dyndit.plans.plan import DepthPlan
from dyndit.plans.search import Pair
from dyndit.plugin.apply import DynDiTHandle
from dyndit.plugin.hooks import watching
from dyndit.sampling.sample import (
    AnySolver,
    Batch,
    Guidance,
    advance,
    balanced_labels,
    device_clock,
    full_plan,
    sample,
    solver_name,
    start,
    to_uint8,
)

HOOK = "dyndit_calibration"
CALIBRATION_SEED = 1_000_003
"""Far from the seeds 0, 1, ... that a result is scored on."""

ToPictures = Callable[[Tensor], Tensor]
"""(B, C, H, W) at the end of a sampling -> (B, C, H, W) uint8: `to_uint8`, or a decoder of latents."""

Call = Callable[[Sequence[int]], Tensor]
"""The user's own way to run a pipeline: B picture numbers -> (B, 3, H, W) uint8, one picture for each.

Picture i must be a function of i alone: its own generator, its own prompt, the same at every call. Of a video, return
the frame to be judged. Numbers run from 0 to 2 * num_pictures - 1; the second half are fresh ones, to measure a plan.

    def call(indices):
        generators = [dyndit.picture_generator(0, i) for i in indices]
        made = pipe([prompts[i] for i in indices], num_inference_steps=20, generator=generators, output_type="pt")
        return (255 * made.images + 0.5).to(torch.uint8).cpu()
"""


class Drawing(Protocol):
    """Draws pictures under plans, the same noise for the same picture number."""

    full: DepthPlan
    """Full depth at every step: the timesteps, the solver and the guidance scale that are calibrated."""
    depths: tuple[int, ...]
    trunk: str
    exits: str
    seed: int
    device: str
    setting: object
    """What else the pictures depend on, as plain data."""

    def replaced(
        self,
        indices: Sequence[int],
        bands: Sequence[Sequence[int]],
        pairs: Sequence[Pair],
        ages: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """The pictures of full depth, then for each band and each pair those with that band's steps at that pair.

        A band is a run of neighbouring steps; bands may overlap, and come in any order.
        indices: B -> (B, 1 or 3, H, W) uint8, 1 + bands * pairs times. ages: for each pair that forecasts, how many
        steps before the band's first the last one at full depth was (earlier than the first step: that one; none at
        all: nothing is forecast); for others 0; empty where no pair forecasts.

        Raises:
            InputError: ages are given, and this drawing cannot forecast.
        """

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """Pictures under a plan, (N, 1 or 3, H, W) uint8: those that tables are measured on, or fresh ones."""

    def cost(self, batch_size: int) -> CostModel:
        """Seconds of the parts of a step, of `batch_size` pictures at a time."""


@dataclass(frozen=True)
class NativeDrawing:
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
        """As of `Drawing`."""
        return full_plan(self.model, self.solver, self.num_steps, self.cfg_scale)

    @property
    def depths(self) -> tuple[int, ...]:
        """As of `Drawing`."""
        return self.model.depths

    @cached_property
    def trunk(self) -> str:
        """As of `Drawing`."""
        return self.model.trunk_hash()

    @cached_property
    def exits(self) -> str:
        """As of `Drawing`."""
        return self.model.exits_hash()

    @property
    def device(self) -> str:
        """As of `Drawing`."""
        return next(self.model.parameters()).device.type

    @property
    def setting(self) -> object:
        """As of `Drawing`."""
        return self.guided_channels

    def replaced(
        self,
        indices: Sequence[int],
        bands: Sequence[Sequence[int]],
        pairs: Sequence[Pair],
        ages: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """As of `Drawing`. Classes come in turn."""
        model, full, guidance = self.model, self.full, Guidance(self.cfg_scale, self.guided_channels)
        labels = [i % model.backbone.num_classes for i in indices]
        batch = Batch(torch.tensor(labels, device=next(model.parameters()).device), tuple(indices), self.seed)
        kept = sorted({-cond for cond, _ in pairs if cond < 0})
        # What a trajectory hands on stands before each step: forks share it, nobody writes to it.
        before, trajectory = [], start(model, batch, self.solver, self.num_steps)
        firsts = {band[0] for band in bands}
        for k in range(self.num_steps):
            before.append(trajectory.fork() if k in firsts else replace(trajectory, scheduler=None, x=None))
            advance(model, batch, trajectory, full, guidance, first=k, stop=k + 1, also_keep=kept)
        yield self.to_pictures(trajectory.x).cpu()
        for band in bands:
            for pair, age in zip(pairs, ages or [0] * len(pairs), strict=True):
                fork = before[band[0]].fork()
                if pair[0] < 0:
                    since = before[max(1, band[0] + 1 - age)] if band[0] else fork
                    fork.memory, fork.guided = since.memory, since.guided
                    pair = pair if band[0] else (-pair[0], pair[1])
                end = advance(model, batch, fork, _replaced(full, band, pair), guidance, first=band[0])
                yield self.to_pictures(end.x).cpu()

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """As of `Drawing`: fresh pictures are those of the seed after the table's."""
        result = sample(
            self.model,
            balanced_labels(num_pictures, self.model.backbone.num_classes),
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
        """As of `Drawing`."""
        return measure_cost(self.model, batch_size=batch_size, solver=self.solver, cfg_scale=self.cfg_scale)


class PipelineDrawing:
    """A user's unmodified pipeline, with the plug-in on it; its plan is switched between calls.

    A pipeline cannot be forked, so every replaced band is a whole run.
    """

    seed = 0

    def __init__(
        self,
        pipe: DiffusionPipeline,
        handle: DynDiTHandle,
        call: Call,
        *,
        cfg_scale: float = 1.0,
        batch_size: int = 8,
        rounds: int = 3,
    ) -> None:
        """Run the pipeline once, for picture 0 at full depth: then its scheduler knows the timesteps.

        cfg_scale: the guidance scale that `call` runs with; 1 where there is no second branch, also of a model with
        distilled guidance. rounds: whole runs that `cost` takes its medians over.

        Raises:
            InputError: `call` returned other things than a picture for each number, or is not guided as said.
        """
        self._handle, self._call, self._batch_size, self._rounds = handle, call, batch_size, rounds
        self._cfg_scale, self._guided = cfg_scale, cfg_scale != 1
        self._separate = self._guided and handle.adapter.guidance == "calls"
        self.depths = handle.model.depths
        self.trunk, self.exits = handle.identities
        handle.plan = None
        calls: list[Inputs] = []
        with self._watching(calls):
            pictures = self._pictures((0,))
        self.setting = hashlib.sha256(pictures.contiguous().numpy().tobytes()).hexdigest()
        self.device = calls[0].x.device.type
        # Only the last ones are run where a pipeline starts from a picture (`strength` below 1).
        timesteps = pipe.scheduler.timesteps.tolist()[-self._num_steps(calls) :]
        solver = solver_name(pipe.scheduler)
        self.full = DepthPlan.full(tuple(timesteps), handle.model.num_blocks, solver, cfg_scale)

    def _watching(self, calls: list[Inputs]) -> object:
        """Collect what the transformer is called with."""
        adapter = self._handle.adapter
        return watching(adapter.transformer, HOOK, lambda *args, **kwargs: calls.append(adapter.read(*args, **kwargs)))

    def _num_steps(self, calls: list[Inputs]) -> int:
        """Steps of one run, from its calls; two calls a step where the branches are apart.

        Raises:
            InputError: the calls are not guided as was said.
        """
        times = [inputs.t[0].item() for inputs in calls]
        found = ((2 if len(times) > 1 and times[0] == times[1] else 1), len(calls[0]))
        expected = (2, 1) if self._separate else (1, 2) if self._guided else (1, 1)
        if found != expected:
            (a, b), (c, d) = found, expected
            raise InputError(
                f"call: each step of picture 0 made {a} calls of {b} rows; expected {c} of {d} at cfg_scale "
                f"{self._cfg_scale:g}"
            )
        return len(times) // found[0]

    def _pictures(self, indices: Sequence[int]) -> Tensor:
        pictures = self._call(tuple(indices))
        shape = tuple(pictures.shape)
        n = len(indices)
        if pictures.dtype != torch.uint8 or len(shape) != 4 or shape[0] != n or shape[1] not in (1, 3):
            found = f"{str(pictures.dtype).removeprefix('torch.')} {shape}"
            raise InputError(f"call: returned {found} for {n} numbers; expected uint8 ({n}, 3, H, W)")
        return pictures.cpu()

    def _under(self, plan: DepthPlan, indices: Sequence[int]) -> Tensor:
        self._handle.plan = plan
        return self._pictures(indices)

    def replaced(
        self,
        indices: Sequence[int],
        bands: Sequence[Sequence[int]],
        pairs: Sequence[Pair],
        ages: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """As of `Drawing`."""
        if ages:
            raise InputError("forecasts: a pipeline's own loop keeps nothing between steps; expected none")
        yield self._under(self.full, indices)
        for band in bands:
            for pair in pairs:
                yield self._under(_replaced(self.full, band, pair), indices)

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """As of `Drawing`: fresh pictures have the numbers after the table's."""
        numbers = range(num_pictures, 2 * num_pictures) if fresh else range(num_pictures)
        return torch.cat([self._under(plan, batch) for batch in batches_of(numbers, self._batch_size)])

    def cost(self, batch_size: int) -> CostModel:
        """As of `Drawing`: parts on a captured call of the pipeline, the rest from the time between its calls.

        Raises:
            InputError: the weights are not where the call is (offloaded ones).
        """
        handle, calls = self._handle, []
        numbers = range(batch_size)
        with self._watching(calls):
            self._under(self.full, numbers)
        seen = calls[len(calls) // 2]
        home, there = next(handle.adapter.parameters()).device, seen.x.device
        if home != there:
            raise InputError(f"transformer: on {home}, called on {there}; expected a pipeline without offload to time")
        stacked = self._guided and not self._separate
        one = seen.rows(0, len(seen) // 2) if stacked else seen
        draw = functools.partial(
            _between,
            handle.adapter.transformer,
            device_clock(seen.x),
            2 if self._separate else 1,
            lambda: self._under(self.full, numbers),
        )
        return measure_parts(handle.model, one, seen if stacked else None, draw, rounds=self._rounds)


def _replaced(full: DepthPlan, band: Sequence[int], pair: Pair) -> DepthPlan:
    """Full depth, but for the steps of a band."""
    return full.with_pairs([pair if k in band else p for k, p in enumerate(full.pairs)])


def batches_of(numbers: range, size: int) -> list[range]:
    """The numbers in order, `size` at a time."""
    return [numbers[low : low + size] for low in range(0, len(numbers), size)]


def _between(
    transformer: nn.Module, clock: Callable[[], float], calls_per_step: int, run: Callable[[], object]
) -> list[float]:
    """Seconds between the transformer's calls during a run, by step: the solver, guidance, callbacks."""
    entered: list[float] = []
    left: list[float] = []
    with watching(transformer, HOOK, lambda *_, **__: entered.append(clock()), lambda: left.append(clock())):
        run()
    gaps = [later - earlier for earlier, later in zip(left, entered[1:], strict=False)]
    whole = len(gaps) // calls_per_step * calls_per_step
    return [sum(gaps[low : low + calls_per_step]) for low in range(0, whole, calls_per_step)]
