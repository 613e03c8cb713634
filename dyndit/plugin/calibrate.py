"""Calibrate a user's pipeline that has the plug-in."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dyndit.calibration.calibrate import planned, to_measure_with
from dyndit.calibration.extractor import FeatureExtractor
from dyndit.calibration.measure import (
    CalibrationSettings,
    OnProgress,
    default_choices,
    measure_table,
    measure_table_into,
)
from dyndit.calibration.samplers import batches_of, replaced_plan
from dyndit.clock import Clock
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.identity import same
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step
from dyndit.plans.table import FILE, ShiftTable
from dyndit.plugin.apply import DynDiTHandle
from dyndit.plugin.experts import own_timesteps
from dyndit.plugin.hooks import watching
from dyndit.sampling.solvers import solver_name
from dyndit.sampling.timing import measure_parts
from dyndit.stats import Moments

HOOK = "dyndit_calibration"
NUM_PICTURES, NUM_BANDS, NUM_DEPTHS = 256, 5, 4
"""Defaults of a table. A stored table with other values serves a call that asks for none."""


Call = Callable[[Sequence[int]], Tensor]
"""The user's function that runs a pipeline: B picture numbers -> (B, 3, H, W) uint8, one picture per number.

Picture i must depend on i alone: its own generator and prompt, the same at every call. For a video, return the frame
to measure. Numbers run from 0 to 2 * num_pictures - 1; the second half are fresh pictures that measure a plan.

    def call(indices):
        generators = [dyndit.sampling.loop.picture_generator(0, i) for i in indices]
        made = pipe([prompts[i] for i in indices], num_inference_steps=20, generator=generators, output_type="pt")
        return (255 * made.images + 0.5).to(torch.uint8).cpu()
"""


class PipelineSampler:
    """A user's unmodified pipeline with the plug-in. The sampler switches the plan between calls.

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
        """Run the pipeline once, for picture 0 at full depth, so that its scheduler knows the timesteps.

        cfg_scale: the guidance scale of `call`; 1 without a second branch, for example with distilled guidance.
        rounds: whole runs per median of `cost`.

        Raises:
            InputError: `call` did not return one picture per number, or its guidance differs from `cfg_scale`.
        """
        self._handle, self._call, self._batch_size, self._rounds = handle, call, batch_size, rounds
        self._cfg_scale, self._guided = cfg_scale, cfg_scale != 1
        self._separate = self._guided and handle.adapter.guidance == "calls"
        self.depths = handle.model.depths
        self.identity = handle.model.identity
        handle.plan = None
        calls: list[Inputs] = []
        with self._watching(calls):
            pictures = self._pictures((0,))
        self.setting = hashlib.sha256(pictures.contiguous().numpy().tobytes()).hexdigest()
        self.device = calls[0].x.device.type
        # A pipeline that starts from a picture (`strength` below 1) runs only the last timesteps.
        timesteps = own_timesteps(pipe, handle.adapter.transformer).tolist()[-self._num_steps(calls) :]
        if len(set(timesteps)) < len(timesteps):
            name = type(pipe.scheduler).__name__
            raise InputError(f"scheduler {name}: runs the model more than once a step; expected one of order 1")
        solver = solver_name(pipe.scheduler)
        self.full = DepthPlan.full(tuple(timesteps), handle.model.num_blocks, solver, cfg_scale)

    def _watching(self, calls: list[Inputs]) -> AbstractContextManager[None]:
        """Collect the inputs of every transformer call."""
        adapter = self._handle.adapter
        return watching(adapter.transformer, HOOK, lambda *args, **kwargs: calls.append(adapter.read(*args, **kwargs)))

    def _num_steps(self, calls: list[Inputs]) -> int:
        """Count the steps of one run from its calls: two calls per step if the branches are separate.

        Raises:
            InputError: the guidance of the calls differs from `cfg_scale`.
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
        choices: Sequence[Step],
        ages: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """See `Sampler`."""
        if ages:
            raise InputError(
                "forecasts: a pipeline is run whole, so their ages cannot be measured in it; expected none"
            )
        yield self._under(self.full, indices)
        for band in bands:
            for choice in choices:
                yield self._under(replaced_plan(self.full, band, choice), indices)

    def bind(self, table: ShiftTable) -> None:
        """See `Sampler`."""
        self._handle.model.check_identity(table.backbone, table.exits, origin="shift table")

    def drawn(self, plan: DepthPlan, num_pictures: int, *, fresh: bool) -> Tensor:
        """See `Sampler`. Fresh pictures have the numbers after the table's pictures."""
        numbers = range(num_pictures, 2 * num_pictures) if fresh else range(num_pictures)
        return torch.cat([self._under(plan, batch) for batch in batches_of(numbers, self._batch_size)])

    def cost(self, batch_size: int) -> CostModel:
        """Time the parts on a captured call of the pipeline, and the solver by the time between its calls.

        Raises:
            InputError: the weights are not on the call's device, for example offloaded weights.
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
            Clock(seen.x.device),
            2 if self._separate else 1,
            lambda: self._under(self.full, numbers),
        )
        return measure_parts(handle.model, one, seen if stacked else None, draw, rounds=self._rounds)


def _between(
    transformer: nn.Module, clock: Callable[[], float], calls_per_step: int, run: Callable[[], object]
) -> list[float]:
    """Measure the seconds between transformer calls of a run, by step: solver, guidance, callbacks."""
    entered: list[float] = []
    left: list[float] = []
    with watching(transformer, HOOK, lambda *_, **__: entered.append(clock()), lambda: left.append(clock())):
        run()
    gaps = [later - earlier for earlier, later in zip(left, entered[1:], strict=False)]
    whole = len(gaps) // calls_per_step * calls_per_step
    return [sum(gaps[low : low + calls_per_step]) for low in range(0, whole, calls_per_step)]


def calibrate_pipeline(
    pipe: DiffusionPipeline,
    handle: DynDiTHandle,
    call: Call,
    *,
    budget: float,
    extractor: FeatureExtractor | None = None,
    reference: Moments | Tensor | None = None,
    num_pictures: int | None = None,
    cfg_scale: float = 1.0,
    num_bands: int | None = None,
    num_depths: int | None = None,
    choices: tuple[Step | str, ...] = (),
    batch_size: int = 8,
    table: ShiftTable | None = None,
    out: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> DepthPlan:
    """Search a plan for a user's pipeline that has the plug-in, by running the pipeline.

        handle = dyndit.apply_dyndit(pipe, "runs/exits", None)
        options = {"budget": 0.6, "extractor": extractor, "reference": real, "cfg_scale": 4.0}
        handle.plan = dyndit.calibrate_pipeline(pipe, handle, call, **options, out="runs/calibration")

    pipe: the pipeline. handle: what `apply_dyndit` returned for it; its plan is restored at the end.
    call: your function that runs the pipeline: picture numbers -> (B, 3, H, W) uint8, see `Call`.
    budget: share of full depth's time, above 0 and at most 1.
    extractor: the network whose features quality is measured by (`dyndit.load_extractor`).
    reference: real pictures, (N, 3, H, W) uint8, or the moments of their features.
    num_pictures: pictures to measure a table on. None: 256, or those of a finished table.
    cfg_scale: the guidance scale of `call`; 1 without a second branch, for example with Flux's distilled guidance.
    num_bands: bands of steps that are replaced together. None: 5, or those of a finished table.
    num_depths: depths of the choices. None: 4, or those of a finished table.
    choices: the steps to measure, such as ("8|4", "8"). Empty: `default_choices`.
    batch_size: pictures a call.
    table: a table measured before. None: one is measured, in 1 + num_bands * num_choices runs a picture.
    out: the folder for this table. An interrupted measurement resumes there, and a finished table serves other budgets,
    step counts and resolutions. None: the table is not kept.
    on_progress: called with the batches done and all batches.

    Raises:
        InputError: an error of `calibrate`, or of `PipelineSampler`; or a table whose pictures, bands or choices are
            not those asked for.
    """
    before = handle.router or handle.plan
    path = None if out is None else Path(out) / FILE
    try:
        sampler = PipelineSampler(pipe, handle, call, cfg_scale=cfg_scale, batch_size=batch_size)
        if table is None and path is not None and path.exists():
            there, mine = ShiftTable.load(path), sampler.identity
            is_mine = same(there.backbone, mine.backbone) and (not there.exits or same(there.exits, mine.exits))
            table = there if is_mine and there.cfg_scale == cfg_scale else None
        if table is not None:
            origin = "table" if path is None else str(path)
            _check_asked(sampler, table, origin, num_pictures, num_bands, num_depths, choices)
        else:
            extractor, reference = to_measure_with(extractor, reference)
            settings = CalibrationSettings(
                num_pictures or NUM_PICTURES,
                num_bands or NUM_BANDS,
                batch_size,
                choices=choices,
                num_depths=num_depths or NUM_DEPTHS,
            )
            measure = measure_table if path is None else functools.partial(measure_table_into, path)
            table = measure(sampler, extractor, reference, settings=settings, on_progress=on_progress)
        return planned(sampler, table, budget, extractor)
    finally:
        handle.plan = before


def _check_asked(
    sampler: PipelineSampler,
    table: ShiftTable,
    origin: str,
    num_pictures: int | None,
    num_bands: int | None,
    num_depths: int | None,
    choices: tuple[Step | str, ...],
) -> None:
    """Refuse a finished table of other pictures, bands or choices than asked for. None and () ask for nothing.

    Raises:
        InputError: naming the table, its value and the wanted value.
    """
    wanted: tuple[Step, ...] = CalibrationSettings(choices=choices).steps
    if not wanted and num_depths is not None:
        wanted = default_choices(sampler.depths, sampler.full.cfg_scale != 1, num_depths)
    bands = num_bands and min(num_bands, table.num_steps)
    mine, theirs = (", ".join(sorted(map(str, steps))) for steps in (wanted, table.choices))
    for asked, found, word in (
        (num_pictures, table.num_pictures, "{} pictures"),
        (bands, table.num_bands, "{} bands"),
        (mine, theirs, "choices {}"),
    ):
        if asked and asked != found:
            raise InputError(
                f"{origin}: measured with {word.format(found)}, but {asked} asked for; expected the same, or another "
                f"folder for another table"
            )
