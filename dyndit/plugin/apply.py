"""The plug-in: dynamic depth inside an unmodified pipeline of diffusers.

    handle = dyndit.apply_dyndit(pipe, "exits.safetensors", plan)
    pipe(class_labels=[207, 360], num_inference_steps=20, generator=generators)     # the pipeline's own call
    handle.stats()                                                                  # depth, blocks, time per step
    handle.plan = other                                                             # nothing is compiled again
    dyndit.remove_dyndit(pipe)

One hook on the transformer's root runs the adapter's blocks in place of the transformer's forward. The timestep of a
call tells its step. The family's adapter knows which rows are unconditional. Only `Call` has a memory, and every
pipeline call starts a new `Call`.
"""

import copy
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from dyndit.clock import Clock
from dyndit.errors import InputError, PlanError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs, Work
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.identity import same
from dyndit.plans.plan import DepthPlan, Router, bind
from dyndit.plans.schedules import skips
from dyndit.plugin import checks
from dyndit.plugin.adapters import Adapter, adapt
from dyndit.plugin.call import COLUMNS, Call, Record, the_timestep
from dyndit.plugin.call_plan import CallPlan
from dyndit.plugin.experts import transformers_in
from dyndit.plugin.hooks import Target, add_hook, remove_hook, transformer_of
from dyndit.plugin.weights import Look
from dyndit.sampling.solvers import solver_name
from dyndit.storage.load import EXITS, load_exits

HOOK = "dyndit_dynamic_depth"
USUAL_EXITS = ExitConfig(head="adaln-linear")
"""Exits that are never trained: an MLP that is still the identity would only take time."""
UNTRAINED = (
    "apply_dyndit: exits that were not trained: every second step skips most blocks and forecasts what they would add. "
    "Distilled exits (record_calls, distill_exits) and a calibrated plan (calibrate_pipeline) leave out more at every "
    "step, for less change in the pictures."
)
_log = logging.getLogger(__name__)


def apply_dyndit(
    target: Target,
    exits: Exits | ExitConfig | str | Path | None = USUAL_EXITS,
    plan: DepthPlan | str | Path | Router | None = None,
    *,
    cfg_scale: float | None = None,
    component: str = "transformer",
    check_identity: bool = True,
    adapter: Adapter | None = None,
) -> "DynDiTHandle":
    """Make a pipeline or a transformer of diffusers run a plan. Its call, its class and its weights do not change.

        handle = dyndit.apply_dyndit(pipe)                                             # untrained exits, at once
        handle = dyndit.apply_dyndit(pipe, "runs/exits", "plan.json")                  # distilled, calibrated
        pipe(class_labels=[207], num_inference_steps=20)                               # the pipeline's own call
        print(handle.stats())
        dyndit.remove_dyndit(pipe)

    target: a pipeline of diffusers, or its transformer.
    exits: exits trained for this transformer: a module, or `exits.safetensors` from training, or its folder. A config:
    untrained exits, copies of the model's own head. None: no exits.
    plan: a plan or its file; or a router, which writes a plan for each call's timesteps; or None: `skips` for
    untrained exits, else full depth.
    cfg_scale: the guidance scale of a router's plans; any value but 1 means that calls are guided. None: each call
    shows whether it is guided.
    component: the pipeline's transformer to serve. Wan 2.2 has two, see `dyndit.plugin.experts`.
    check_identity: refuse exits and plans of another backbone. The check reads the transformer's weights, some seconds
    per billion parameters; weights in half precision are the same backbone.
    adapter: a description of a transformer that no adapter knows (`dyndit.plugin.generic.BlockAdapter`).

    Raises:
        InputError: no adapter serves the transformer, or its hooks would no longer run.
        CheckpointError, PlanError: exits or a plan that cannot be read, or that belong to another model.
    """
    transformer = transformer_of(target, component)
    checks.check_hookable(transformer, HOOK)
    adapter = adapt(transformer, adapter)
    from_file = isinstance(exits, str | Path)
    if from_file:
        path = Path(exits)
        exits = load_exits(path / EXITS if path.is_dir() else path, adapter, check_identity=check_identity)
    if isinstance(exits, ExitConfig):
        exits = Exits(adapter, exits).requires_grad_(False).eval()
        if plan is None:
            plan = skips
            _log.warning(UNTRAINED)
    if exits is not None and max(exits.layers) >= adapter.num_blocks:
        deepest = max(exits.layers)
        raise InputError(f"exits: one after layer {deepest}, but the transformer has {adapter.num_blocks} blocks")
    pipeline = target if isinstance(target, DiffusionPipeline) else None
    handle = DynDiTHandle(DynamicDepth(adapter, exits), pipeline, cfg_scale, check_identity)
    if from_file and check_identity:
        handle.bind_exits()
    handle.plan = plan
    add_hook(transformer, _Hook(handle), HOOK)
    return handle


def remove_dyndit(target: Target) -> None:
    """Remove the plug-in and restore the transformer. Without the plug-in, do nothing: `dyndit.remove_dyndit(pipe)`.

    target: the transformer, or a pipeline, all of whose transformers are restored.
    """
    found = transformers_in(target) if isinstance(target, DiffusionPipeline) else []
    for transformer in found or [transformer_of(target)]:
        if isinstance(transformer, torch._dynamo.OptimizedModule):  # pyright: ignore[reportPrivateUsage]  compiled as a whole after apply_dyndit
            transformer = transformer._orig_mod  # pyright: ignore[reportPrivateUsage]
        remove_hook(transformer, HOOK)


class DynDiTHandle:
    """The result of `apply_dyndit`: it holds the plan to run and the record of the last pipeline call."""

    def __init__(
        self, model: DynamicDepth, pipeline: DiffusionPipeline | None, cfg_scale: float | None, check_identity: bool
    ) -> None:
        self.model = model
        """The adapter with its exits; `model.depths` are the depths that a plan can use."""
        self._given = model.exits
        self._check_identity = check_identity
        self._exits_for = ""
        """Identity of the backbone that the exits are bound to; "" if they are not."""
        self._look: Look | None = None
        """The weights as they were when everything bound to them was checked; None if something does not fit them."""
        self._bound = False
        """True if the plan or the exits are bound to the weights."""
        self._plans = CallPlan(model, pipeline, cfg_scale, self._check)
        self._call = Call()

    @property
    def adapter(self) -> Adapter:
        """Return the transformer, cut into embed, blocks and head."""
        assert isinstance(self.model.backbone, Adapter)
        return self.model.backbone

    @property
    def plan(self) -> DepthPlan | None:
        """Return the given plan, or the plan that the router wrote for the last call; None: full depth."""
        return self._plans.plan

    @plan.setter
    def plan(self, plan: DepthPlan | str | Path | Router | None) -> None:
        """Switch the plan from the next call of the transformer on. Nothing is compiled again.

        Raises:
            PlanError: the plan does not fit the model, or its file cannot be read.
            InputError: a router, but the plug-in sits on a bare transformer and sees no scheduler.
        """
        if isinstance(plan, str | Path):
            plan = DepthPlan.load(Path(plan))
        self._plans.give(plan)
        self._call = Call()

    @property
    def running(self) -> DepthPlan | None:
        """Return the plan of the last call: `plan`, rescaled if the call has other timesteps (`DepthPlan.at`)."""
        return self._plans.running

    @property
    def router(self) -> Router | None:
        """Return the router that writes a plan for every call, or None."""
        return self._plans.router

    def full_plan(self) -> DepthPlan:
        """Return the full plan at the timesteps of the last pipeline call, as input for searches and ramps.

        Raises:
            InputError: the pipeline was not called yet.
        """
        if not self._call.records:
            raise InputError("plan: no call of the pipeline was seen yet; expected one before")
        timesteps = dict.fromkeys(record.timestep for record in self._call.records)
        plans = self._plans
        if plans.plan is None and plans.times:  # take the timesteps before the pipeline rounded them
            times, first = plans.times, next(iter(timesteps))
            start = min(range(len(times)), key=lambda k: abs(times[k] - first))
            timesteps = dict.fromkeys(times[start : start + self._call.step + 1])
        solver = "" if plans.pipeline is None else solver_name(plans.pipeline.scheduler)
        scale = (plans.cfg_scale or 1.0) if plans.plan is None else plans.plan.cfg_scale
        return DepthPlan.full(tuple(timesteps), self.model.num_blocks, solver, scale)

    def stats(self) -> pd.DataFrame:
        """Return the work of the last pipeline call.

        -> a row per step and branch: step, timestep, branch ("cond", "uncond"), rows, depth, blocks (depth times rows)
        and seconds in the transformer. Branches of one batch share its time in proportion to their blocks.
        """
        return pd.DataFrame([row for record in self._call.records for row in record.rows()], columns=COLUMNS)

    def remove(self) -> None:
        """Remove the plug-in from this transformer. See `remove_dyndit`."""
        remove_dyndit(self.adapter.transformer)

    def run(self, *args: Any, **kwargs: Any) -> object:
        """Run one call of the transformer's forward at the plan's depths."""
        inputs = self.adapter.read(*args, **kwargs)
        self._follow(inputs.x)
        if self._plans.begin(lambda: self._looks_guided(inputs)):
            self._call = Call()
        try:
            prediction = self._predict(inputs)
        except BaseException:
            self._call = Call()
            raise
        return self.adapter.output(prediction, inputs, kwargs.get("return_dict", True))

    def _predict(self, inputs: Inputs) -> Tensor:
        """Run the step of a call, by the same function as the sampler."""
        timestep = found = self.adapter.scheduler_timestep(the_timestep(inputs.t))
        largest = max(timestep, self.adapter.scheduler_timestep(0.0))  # of time that runs backwards, 0 is the noise
        slack = torch.finfo(inputs.t.dtype).eps * largest if inputs.t.is_floating_point() else 0.0
        second = self._call.is_second_pass(inputs.x, found)
        if second:
            k = self._call.step
            self._plans.turn_guided(k)
        else:
            k = self._step(timestep, slack)
            if self._call.is_over(k, self._plans.evaluations(timestep)):
                self._call = Call()
        timesteps, work, guided = self._asked(k, timestep)
        self._look_around(inputs, guided is not None)
        if guided is not None and self._plans.running is not None:
            checks.check_goes_on(self._plans.running, self._call, k, work, len(inputs))
            checks.check_guidance(self.adapter, inputs, guided, self._call, second=second)
        clock = Clock(inputs.x.device)
        began = clock.mark()
        if second:
            prediction, ran = self._second(inputs, work, guided)
        elif guided and self.adapter.guidance != "calls":
            prediction, ran = self._stacked(k, inputs, work, timesteps)
        else:
            step = StepInputs(k, (inputs,), replace(work, depths=work.depths[:1]), timesteps)
            self._call.first, self._call.memory = self.model.predict(step, self._call.memory)
            prediction, ran = self._call.first[0], [("cond", len(inputs), work.depths[0])]
        seconds = partial(clock.between, began, clock.mark())  # read later, so that nothing waits for the device here
        self._call.enter(Record(k, timesteps[k], tuple(ran), seconds), found, inputs.x, second=second)
        return prediction

    def _asked(self, k: int, timestep: float) -> tuple[tuple[float, ...], Work, bool | None]:
        """Return timesteps by step, the work of step k, and True if it is guided (None without a plan)."""
        plan = self._plans.running
        if plan is None:
            return (timestep,) * (k + 1), Work((self.model.num_blocks,)), None
        return plan.timesteps, plan.works[k], plan.cfg_scale != 1

    def _stacked(
        self, k: int, inputs: Inputs, work: Work, timesteps: tuple[float, ...]
    ) -> tuple[Tensor, list[tuple[str, int, int]]]:
        """Run a call that holds both branches. Rows without a pass of their own get the guiding prediction.

        It comes from an exit or from held guidance. Without a guide it is the conditional prediction, so that the
        pipeline's own guidance has no effect.
        """
        half = len(inputs) // 2
        halves = inputs.rows(0, half), inputs.rows(half, None)
        uncond_first = self.adapter.guidance == "uncond first"
        c, u = reversed(halves) if uncond_first else halves
        step = StepInputs(k, (c, u)[: len(work.depths)], work, timesteps, uncond_first)
        predictions, self._call.memory = self.model.predict(step, self._call.memory)
        own, guide = predictions[0], predictions[-1].to(predictions[0].dtype)
        cond, uncond = (*work.depths, 0)[:2]
        ran = [("both", len(inputs), cond)] if cond == uncond else [("cond", half, cond), ("uncond", half, uncond)]
        return torch.cat([guide, own] if uncond_first else [own, guide]), ran

    def _second(self, inputs: Inputs, work: Work, guided: bool | None) -> tuple[Tensor, list[tuple[str, int, int]]]:
        """Run the second of two calls on the same latents, or return the guiding prediction without a pass."""
        depth = self.model.num_blocks if guided is None else sum(work.depths[1:])
        if depth:
            (prediction,) = self.model.run([inputs], [depth])
            guided_by = (self._call.first[0], prediction)
            self._call.memory = replace(self._call.memory, guided=guided_by)
            prediction = work.strengthened(*guided_by).to(prediction.dtype)
        else:
            prediction = self._call.first[-1].to(self._call.first[0].dtype)
        return prediction, [("uncond", len(inputs), depth)]

    def _step(self, timestep: float, slack: float) -> int:
        """Find the step of a transformer call."""
        last = self._call.records[-1] if self._call.records and timestep <= self._call.timestep else None
        if self._plans.plan is not None:
            return self._plans.step(timestep, slack, -1 if last is None else last.step)
        # Full depth throughout: count steps until the timestep rises again.
        again = self._plans.pipeline is None and timestep == self._call.timestep
        return 0 if last is None or again else last.step + 1

    def _looks_guided(self, inputs: Inputs) -> bool:
        """Tell if a call seems to be guided. A family that calls once per branch shows it at its second call."""
        return self.adapter.guidance != "calls" and self.adapter.is_guided(inputs) is not False

    def _look_around(self, inputs: Inputs, planned: bool) -> None:
        """Refuse what changed around the plug-in since it was put on, or since the last call.

        Raises:
            InputError: another hook or a call that depth cannot be combined with.
            PlanError: weights that are no longer those that the plan or the exits are bound to.
        """
        new, transformer = not self._call.records, self.adapter.transformer
        if new:
            checks.check_beside(transformer)
        if new and planned:
            checks.check_processors(transformer)
        if planned:
            checks.check_rows(inputs, self.adapter)
        if not (planned and self._bound):
            return
        if self._look is not None and (
            self._look.glance(transformer, self._given)
            if not new
            else Look.at(transformer, self._given).unchanged(self._look)
        ):
            return
        if self._plans.plan is not None:  # as it is where `planned`
            self._check(self._plans.plan)
        if self._look is None:
            raise PlanError(
                f"exits: made for backbone {self._exits_for}, but the transformer's weights are "
                f"{self.model.identity.backbone} now; expected them unchanged, any LoRA unloaded, or apply_dyndit with "
                f"check_identity=False"
            )

    def _follow(self, x: Tensor) -> None:
        """Move the exits to the latents' device and precision, because the pipeline's own `.to` does not know them.

        Move a copy: the given exits may also serve another pipeline in another precision.
        """
        if self._given is None:
            return
        there = (x.device, x.dtype)
        if self.model.exits is None or _place(self.model.exits) != there:
            same = _place(self._given) == there
            self.model.exits = self._given if same else copy.deepcopy(self._given).to(*there)

    def bind_exits(self) -> None:
        """Bind the exits to the transformer's weights as they are now."""
        self._exits_for = self.model.identity.backbone

    def _check(self, plan: DepthPlan) -> None:
        """Check that a plan fits, and remember the weights if the exits fit them too.

        Raises:
            PlanError: the plan does not fit the model.
        """
        bind(plan, self.model, check_identity=self._check_identity)
        self._bound = bool(self._exits_for or (self._check_identity and (plan.backbone or plan.exits)))
        fits = not self._exits_for or (self._bound and same(self._exits_for, self.model.identity.backbone))
        self._look = Look.at(self.adapter.transformer, self._given) if self._bound and fits else None


class _Hook(ModelHook):
    """Run the handle in place of the transformer's forward."""

    def __init__(self, handle: DynDiTHandle) -> None:
        super().__init__()
        self.handle = handle
        # Compiling the transformer as a whole must not trace the plan, which changes from call to call.
        self._run = torch.compiler.disable(handle.run)

    def __deepcopy__(self, _memo: object) -> "_Hook":
        return _Hook(self.handle)  # no copy of the pipeline; `pre_forward` refuses the copied transformer

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Refuse a copy: the hook in it would run the weights of the original."""
        if module is not self.handle.adapter.transformer:
            raise InputError(
                "transformer: a copy of one that has the plug-in, which would run the original's weights; expected "
                "remove_dyndit(copy), then apply_dyndit on it"
            )
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        """See `module.forward`."""
        return self._run(*args, **kwargs)


def _place(exits: Exits) -> tuple[torch.device, torch.dtype]:
    first = next(exits.parameters())
    return first.device, first.dtype
