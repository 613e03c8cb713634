"""The plug-in: dynamic depth inside an unmodified pipeline of diffusers.

    handle = dyndit.apply_dyndit(pipe, "exits.safetensors", plan)
    pipe(class_labels=[207, 360], num_inference_steps=20, generator=generators)     # the pipeline's own call
    handle.stats()                                                                  # depth, blocks, time per step
    handle.plan = other                                                             # nothing is compiled again
    dyndit.remove_dyndit(pipe)

One hook on the transformer's root runs the adapter's blocks in place of the transformer's forward. Which step a call
belongs to is read from its timestep; which of its rows are unconditional the family's adapter knows. `_Call` is the one
place with memory, and it starts anew with every pipeline call.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dyndit.clock import Clock
from dyndit.errors import InputError, PlanError
from dyndit.models import Inputs
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import Exits
from dyndit.plans.plan import DepthPlan, Router, guide_of
from dyndit.plugin.adapters import Adapter, adapt
from dyndit.plugin.hooks import Target, add_hook, remove_hook, transformer_of
from dyndit.sampling.solvers import solver_name
from dyndit.storage.load import EXITS, load_exits

HOOK = "dyndit_dynamic_depth"


def apply_dyndit(
    target: Target,
    exits: Exits | str | Path | None,
    plan: DepthPlan | str | Path | Router | None = None,
    *,
    cfg_scale: float | None = None,
    check_trunk: bool = True,
) -> "DynDiTHandle":
    """Make a pipeline, or a transformer, of diffusers run a plan. Its call, its class and its weights stay as they are.

    exits: trained for this very transformer: a module, or the `exits.safetensors` that training left (or its folder).
    plan: a plan or its file; or a router, which writes one for each call's timesteps; or None, full depth throughout.
    cfg_scale: the guidance scale a router's plans are for; anything but 1 says that calls are guided.
    check_trunk: refuse exits and plans of another trunk. It hashes the transformer's weights, some seconds per billion
    parameters. Weights rounded to half precision are another trunk: put the plug-in on before `pipe.to(dtype)`, or turn
    the check off.

    Raises:
        InputError: no adapter serves the transformer, or it has hooks that would not run any more.
        CheckpointError, PlanError: exits or a plan that cannot be read or belong to something else.
    """
    transformer = transformer_of(target)
    _check_hookable(transformer)
    adapter = adapt(transformer)
    if isinstance(exits, str | Path):
        path = Path(exits)
        exits = load_exits(path / EXITS if path.is_dir() else path, adapter, check_trunk=check_trunk)
    if exits is not None and max(exits.layers) >= adapter.num_blocks:
        deepest = max(exits.layers)
        raise InputError(f"exits: one after layer {deepest}, but the transformer has {adapter.num_blocks} blocks")
    pipeline = target if isinstance(target, DiffusionPipeline) else None
    handle = DynDiTHandle(DynamicDepth(adapter, exits), pipeline, cfg_scale, check_trunk)
    handle.plan = plan
    add_hook(transformer, _Hook(handle), HOOK)
    return handle


def remove_dyndit(target: Target) -> None:
    """Take the plug-in off: the transformer is as it was before `apply_dyndit`. Nothing happens where there is none."""
    transformer = transformer_of(target)
    if isinstance(transformer, torch._dynamo.OptimizedModule):  # compiled as a whole since
        transformer = transformer._orig_mod
    remove_hook(transformer, HOOK)


class DynDiTHandle:
    """What `apply_dyndit` gives: the plan to run, and what the last pipeline call did."""

    def __init__(
        self, model: DynamicDepth, pipeline: DiffusionPipeline | None, cfg_scale: float | None, check_trunk: bool
    ) -> None:
        self.model = model
        """The adapter with its exits; `model.depths` are the depths that a plan can use."""
        self._given = model.exits
        self._pipeline, self._cfg_scale = pipeline, cfg_scale
        self._check_trunk = check_trunk
        self._plan: DepthPlan | None = None
        self._router: Router | None = None
        self._timesteps: Tensor | None = None
        """The scheduler's, in the call that runs."""
        self._call = _Call()

    @property
    def adapter(self) -> Adapter:
        """The transformer, cut into embed, blocks and head."""
        return self.model.backbone

    @cached_property
    def identities(self) -> tuple[str, str]:
        """Hashes of the trunk and of the exits that plans are checked against; "" where they are not."""
        return (self.model.trunk_hash(), self.model.exits_hash()) if self._check_trunk else ("", "")

    @property
    def plan(self) -> DepthPlan | None:
        """The plan that runs: the given one, or the one that the router wrote for the last call; None: full depth."""
        return self._plan

    @plan.setter
    def plan(self, plan: DepthPlan | str | Path | Router | None) -> None:
        """Switch, from the next call of the transformer on. Nothing is compiled again.

        Raises:
            PlanError: the plan does not fit the model, or its file cannot be read.
            InputError: a router, where the plug-in sits on a bare transformer and sees no scheduler.
        """
        if isinstance(plan, str | Path):
            plan = DepthPlan.load(plan)
        router = plan if callable(plan) else None
        if router is not None and self._pipeline is None:
            raise InputError("plan: a router needs the scheduler's timesteps; expected apply_dyndit on the pipeline")
        if plan is not None and router is None:
            self._check(plan)
        self._plan, self._router, self._timesteps = (None if router else plan), router, None
        self._call = _Call()

    @property
    def router(self) -> Router | None:
        """What writes a plan for every call, where one was given."""
        return self._router

    def full_plan(self) -> DepthPlan:
        """The original model at every timestep of the last pipeline call: what searched plans and ramps start from.

        Raises:
            InputError: nothing was called yet.
        """
        if not self._call.records:
            raise InputError("plan: no call of the pipeline was seen yet; expected one before")
        timesteps = dict.fromkeys(record.timestep for record in self._call.records)
        if self._plan is None and self._timesteps is not None:  # as they were before the pipeline rounded them
            times, first = self._timesteps.tolist(), next(iter(timesteps))
            start = min(range(len(times)), key=lambda k: abs(times[k] - first))
            timesteps = dict.fromkeys(times[start : start + self._call.step + 1])
        solver = "" if self._pipeline is None else solver_name(self._pipeline.scheduler)
        scale = (self._cfg_scale or 1.0) if self._plan is None else self._plan.cfg_scale
        return DepthPlan.full(tuple(timesteps), self.model.num_blocks, solver, scale)

    def stats(self) -> pd.DataFrame:
        """What the last pipeline call ran.

        -> a row per step and branch: step, timestep, branch ("cond", "uncond"), rows, depth, blocks (depth times rows)
        and seconds in the transformer. Branches that ran as one batch share its time out by their blocks.
        """
        return pd.DataFrame([row for record in self._call.records for row in record.rows()], columns=_COLUMNS)

    def remove(self) -> None:
        """`remove_dyndit`, of this transformer."""
        remove_dyndit(self.adapter.transformer)

    def run(self, *args: object, **kwargs: object) -> object:
        """One call of the transformer's forward, at the plan's depths."""
        inputs = self.adapter.read(*args, **kwargs)
        self._follow(inputs.x)
        self._begin()
        try:
            prediction = self._predict(inputs)
        except BaseException:
            self._call = _Call()
            raise
        return self.adapter.output(prediction, kwargs.get("return_dict", True))

    def _predict(self, inputs: Inputs) -> Tensor:
        timestep = found = _the_timestep(inputs.t) * self.adapter.timestep_scale
        second = self._call.is_second_pass(inputs.x, found)
        step = self._call.step if second else self._step(timestep, inputs.t.dtype)
        if not second and self._call.is_over(step):
            self._call = _Call()
        full = self.model.num_blocks
        if self._plan is None:
            cond, uncond, guided = full, full, None
        else:
            (cond, uncond), guided = self._plan.pairs[step], self._plan.cfg_scale != 1
            timestep = self._plan.timesteps[step]
            if second or not self._call.records:
                self._check_guidance(inputs, guided, second)
        if self.adapter.guidance == "calls":
            branches = {"uncond": (inputs, uncond)} if second else {"cond": (inputs, cond)}
        elif guided and cond != uncond:
            halves = inputs.rows(0, len(inputs) // 2), inputs.rows(len(inputs) // 2, None)
            c, u = halves if self.adapter.guidance == "cond first" else reversed(halves)
            branches = {"cond": (c, cond), "uncond": (u, uncond)}
        else:
            branches = {"both" if guided else "cond": (inputs, cond)}
        clock = Clock(inputs.x.device)
        began = clock.mark()
        prediction = self._run(branches, guide_of(uncond) if guided else 0)
        did = tuple((name, len(rows), max(depth, 0)) for name, (rows, depth) in branches.items())
        seconds = partial(clock.between, began, clock.mark())  # read later: nothing waits for the device here
        self._call.enter(_Record(step, timestep, did, seconds), found, inputs.x, prediction)
        return prediction

    def _run(self, branches: dict[str, tuple[Inputs, int]], guide: int) -> Tensor:
        """Predict each branch at its depth, in the order in which the family stacks them.

        An unconditional depth of 0 is no pass: those rows get the conditional prediction, which is no guidance. With a
        guide they get the prediction of the conditional branch's own exit at that depth.
        """
        running = {name: part for name, part in branches.items() if part[1] > 0}
        if guide and running:
            rows, depth = running["cond"]
            weak, own = self.model.along(rows.x, rows.t, rows.y, (guide, depth))
            predictions, self._call.guide = [own, weak], weak
        elif running:
            predictions = self.model.run([rows for rows, _ in running.values()], [d for _, d in running.values()])
        else:  # the second of two calls
            predictions = [self._call.guide if guide else self._call.prediction]
        if len(branches) == 1:
            return predictions[0]
        c, u = predictions if len(predictions) == 2 else predictions * 2
        return torch.cat([c, u] if self.adapter.guidance == "cond first" else [u, c])

    def _step(self, timestep: float, dtype: torch.dtype) -> int:
        """The step that a call of the transformer belongs to.

        Raises:
            PlanError: the plan has none at this timestep.
        """
        last = self._call.records[-1] if self._call.records and timestep <= self._call.timestep else None
        if self._plan is None:  # full depth throughout: steps are counted, from one rise of the timestep to the next
            again = self._pipeline is None and timestep == self._call.timestep
            return 0 if last is None or again else last.step + 1
        slack = torch.finfo(dtype).eps * timestep if dtype.is_floating_point else 0.0
        step = find_step(self._plan.timesteps, timestep, slack + 1e-3, -1 if last is None else last.step)
        if step is None:
            raise PlanError(
                f"plan: made for {self._plan.num_steps} steps of {self._plan.solver or 'its solver'}, none of them at "
                f"timestep {timestep:g}; expected the scheduler and the number of steps it was made for"
            )
        return step

    def _follow(self, x: Tensor) -> None:
        """Exits run where the latents are: the pipeline's own `.to` does not know them.

        On a copy, since the given ones may serve another pipeline, in another precision, too.
        """
        if self._given is None:
            return
        there = (x.device, x.dtype)
        if _place(self.model.exits) != there:
            same = _place(self._given) == there
            self.model.exits = self._given if same else copy.deepcopy(self._given).to(*there)

    def _begin(self) -> None:
        """Tell a new call of the pipeline: its scheduler has new timesteps. The router writes a plan for them."""
        timesteps = None if self._pipeline is None else self._pipeline.scheduler.timesteps
        if timesteps is self._timesteps:
            return
        self._call = _Call()
        if self._router is not None:
            self._route(timesteps)
        self._timesteps = timesteps

    def _route(self, timesteps: Tensor) -> None:
        """Let the router write the plan, where the timesteps are others than those of its last one."""
        solver = solver_name(self._pipeline.scheduler)
        scale = 1.0 if self._cfg_scale is None else self._cfg_scale
        full = DepthPlan.full(tuple(dict.fromkeys(timesteps.tolist())), self.model.num_blocks, solver, scale)
        if self._plan is None or (self._plan.timesteps, self._plan.solver) != (full.timesteps, solver):
            plan = self._router(full, self.model.depths)
            self._check(plan)
            self._plan = plan

    def _check(self, plan: DepthPlan) -> None:
        bound = self._check_trunk and bool(plan.trunk or plan.exits)
        if plan.forecasts:
            raise PlanError("plan: forecasts from earlier steps, which a pipeline's own loop does not keep")
        if plan.reuses:
            raise PlanError("plan: reuses guidance of earlier steps, which a pipeline's own loop does not keep")
        trunk, exits = self.identities if bound else (None, None)
        plan.check(depths=self.model.depths, trunk=trunk, exits=exits)

    def _check_guidance(self, inputs: Inputs, guided: bool, second: bool) -> None:
        """Refuse a guided call under an unguided plan and the reverse, where the rows tell.

        Raises:
            PlanError: naming both.
        """
        found = True if second else self.adapter.is_guided(inputs)
        if found is not None and found != guided:
            words = {True: "guided", False: "unguided"}
            raise PlanError(f"plan: made for {words[guided]} sampling, but the pipeline's call is {words[found]}")
        if guided and self.adapter.guidance != "calls" and len(inputs) % 2:
            raise PlanError(
                f"plan: made for guided sampling, but the call has {len(inputs)} rows; expected two branches"
            )


def find_step(timesteps: Sequence[float], timestep: float, slack: float, last: int) -> int | None:
    """The step at `timestep`, which may be off by `slack`: a pipeline in half precision rounds it.

    Where rounding leaves several in reach, the next one after step `last` of the same call (-1: a new call), else the
    nearest. None: there is none in reach.
    """
    gaps = {k: abs(t - timestep) for k, t in enumerate(timesteps) if abs(t - timestep) <= slack}
    later = [k for k in gaps if k > last] if last >= 0 else []
    if len(gaps) > 1 and later:
        return min(later)
    return min(gaps, key=gaps.get, default=None)


class _Hook(ModelHook):
    """Runs the handle in place of the transformer's forward."""

    def __init__(self, handle: DynDiTHandle) -> None:
        super().__init__()
        self.handle = handle

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        """As `module.forward`."""
        return self.handle.run(*args, **kwargs)


_COLUMNS = ["step", "timestep", "branch", "rows", "depth", "blocks", "seconds"]


@dataclass(frozen=True)
class _Record:
    """One call of the transformer: (branch, rows, depth) of what ran as one batch, and its time."""

    step: int
    timestep: float
    branches: tuple[tuple[str, int, int], ...]
    seconds: Callable[[], float]

    def rows(self) -> list[tuple[object, ...]]:
        """Rows of `stats`."""
        parts = [
            (branch, rows // 2 if name == "both" else rows, depth)
            for name, rows, depth in self.branches
            for branch in (("cond", "uncond") if name == "both" else (name,))
        ]
        total, seconds = sum(rows * depth for _, rows, depth in parts) or 1, self.seconds()
        return [
            (self.step, self.timestep, branch, rows, depth, rows * depth, seconds * rows * depth / total)
            for branch, rows, depth in parts
        ]


@dataclass
class _Call:
    """What one pipeline call leaves from step to step. A new one takes its place when the next call begins."""

    records: list[_Record] = field(default_factory=list)
    step: int = -1
    timestep: float = float("inf")
    """As the transformer was given it, rounded to the pipeline's precision."""
    prediction: Tensor | None = None
    guide: Tensor | None = None
    """What the own exit that guides this step predicted, for the second of two calls."""
    passes: int = 0
    _latents: Callable[[], Tensor | None] = lambda: None

    def is_second_pass(self, x: Tensor, timestep: float) -> bool:
        """Whether the last call was on these very latents: the same step's other branch.

        The timestep tells from the next step of a loop that writes into its latents.
        """
        return self.passes == 1 and self._latents() is x and self.timestep == timestep

    def is_over(self, step: int) -> bool:
        """Whether a call that begins at `step` belongs to another pipeline call."""
        return step <= self.step

    def enter(self, record: _Record, timestep: float, x: Tensor, prediction: Tensor) -> None:
        """Note what was run, on which latents, and what came of it."""
        self.passes = 2 if self.is_second_pass(x, timestep) else 1
        self.records.append(record)
        self.step, self.timestep = record.step, timestep
        self.prediction, self._latents = prediction, weakref.ref(x)


def _check_hookable(transformer: nn.Module) -> None:
    """Refuse what would be run around: hooks that are there already, and a transformer compiled as a whole."""
    if isinstance(transformer, torch._dynamo.OptimizedModule) or transformer._compiled_call_impl is not None:
        raise InputError(
            "transformer: compiled as a whole, which fixes its depth; expected its blocks compiled one by one, as by "
            "`for block in transformer.transformer_blocks: block.compile(fullgraph=True)`"
        )
    registry: HookRegistry | None = transformer.__dict__.get("_diffusers_hook")
    names = list(registry.hooks) if registry is not None else []
    if HOOK in names:
        raise InputError("transformer: has the plug-in already; expected `handle.plan = ...`, or remove_dyndit first")
    if names:
        raise InputError(f"transformer: has the hook {names[0]}; expected apply_dyndit before other hooks are added")
    if "_hf_hook" in transformer.__dict__:
        raise InputError("transformer: is offloaded already; expected apply_dyndit before enable_model_cpu_offload")


def _place(exits: Exits) -> tuple[torch.device, torch.dtype]:
    first = next(exits.parameters())
    return first.device, first.dtype


def _the_timestep(t: Tensor) -> float:
    """The one timestep of all rows.

    Raises:
        InputError: rows of different timesteps, which no plan has.
    """
    values = t.tolist()
    if any(value != values[0] for value in values):
        raise InputError(f"transformer: called with timesteps {sorted(set(values))[:3]} in one batch; expected one")
    return values[0]
