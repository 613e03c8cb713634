"""The plan of a pipeline's call: a given plan, a router's, or either rescaled to the timesteps of the call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dyndit.errors import InputError, PlanError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, Router
from dyndit.plugin.call import find_step
from dyndit.plugin.experts import are_own, own_timesteps
from dyndit.sampling.solvers import scheduler_class, solver_name

SLACK = 1e-3
"""Two timesteps this near are the same, beside the rounding of a pipeline in half precision."""
ANGLES = ("SCMScheduler",)
"""Schedulers whose timesteps are angles. The process's log-SNR knows nothing of them."""
SOME_SCALE = 2.0
"""Guidance scale of a router's plan for a call that is seen to be guided. The scale itself is the pipeline's."""


@dataclass
class CallPlan:
    """The plan to run, and the plan of the running call."""

    model: DynamicDepth
    pipeline: DiffusionPipeline | None
    cfg_scale: float | None
    """The guidance scale of a router's plans; None if each call shows whether it is guided."""
    check: Callable[[DepthPlan], None]
    """Refuses a plan that does not fit the model."""
    plan: DepthPlan | None = None
    """The given plan, or the plan that the router wrote last; None: full depth."""
    router: Router | None = None
    running: DepthPlan | None = None
    """The plan at the timesteps of the running call; None before its first step."""
    times: tuple[float, ...] = ()
    """The scheduler's timesteps of this transformer; empty on a bare one. A solver of order 2 has some twice."""
    _timesteps: Tensor | None = field(default=None, repr=False)

    @property
    def _transformer(self) -> Any:
        """Return the transformer that the adapter holds."""
        return self.model.backbone.transformer

    @property
    def _seen(self) -> Any:
        """Return the pipeline, whose scheduler tells the timesteps."""
        return self.pipeline

    def give(self, plan: DepthPlan | Router | None) -> None:
        """Switch to a plan, a router, or full depth.

        Raises:
            PlanError: the plan does not fit the model.
            InputError: a router, but the plug-in sits on a bare transformer and sees no scheduler.
        """
        router = None if isinstance(plan, DepthPlan) else plan
        if router is not None and self.pipeline is None:
            raise InputError("plan: a router needs the scheduler's timesteps; expected apply_dyndit on the pipeline")
        given = plan if isinstance(plan, DepthPlan) else None
        if given is not None:
            self.check(given)
        self.plan, self.router, self.running, self._timesteps = given, router, None, None

    def begin(self, looks_guided: Callable[[], bool]) -> bool:
        """Return True if the scheduler has new timesteps: a new call. The router then writes a plan for them."""
        timesteps = None if self.pipeline is None else self.pipeline.scheduler.timesteps
        if timesteps is self._timesteps:
            return False
        self._timesteps, self.running = timesteps, None
        own = () if timesteps is None else own_timesteps(self._seen, self._transformer).tolist()
        self.times = tuple(own)
        if self.router is not None:
            self._route(looks_guided() if self.cfg_scale is None else self.cfg_scale != 1)
        return True

    def _route(self, guided: bool) -> None:
        """Let the router write a plan if the call differs from its last plan's in timesteps, solver or guidance."""
        solver = solver_name(self._seen.scheduler)
        scale = (SOME_SCALE if self.cfg_scale is None else self.cfg_scale) if guided else 1.0
        full = DepthPlan.full(tuple(dict.fromkeys(self.times)), self.model.num_blocks, solver, scale)
        key = ("timesteps", "solver", "cfg_scale")
        if self.plan is None or any(getattr(self.plan, name) != getattr(full, name) for name in key):
            assert self.router is not None
            plan = self.router(full, self.model.depths)
            self.check(plan)
            self.plan = plan

    def turn_guided(self, k: int) -> None:
        """Write the call's plan anew if the second transformer call of step k shows that it is guided.

        Raises:
            PlanError: the first transformer call would have run other work under the new plan.
        """
        if self.router is None or self.cfg_scale is not None or self.running is None or self.running.cfg_scale != 1:
            return
        before = self.running.works[k]
        self._route(guided=True)
        assert self.plan is not None  # `_route` wrote it
        self.running, now = self.plan, self.plan.works[k]
        if k or (before.depths[0], before.kept) != (now.depths[0], now.kept) or now.own_exit:
            raise PlanError("plan: written for an unguided call, which is guided; expected apply_dyndit(cfg_scale=...)")

    def step(self, timestep: float, slack: float, last: int) -> int:
        """Find the step of a transformer call. The first step of a call fits the plan to the call.

        slack: the timestep may be off by it. last: the step before in the same call; -1: none.

        Raises:
            PlanError: the plan has no step at this timestep.
        """
        if self.running is None:
            self.running = self._fitted(timestep, slack + SLACK)
        plan = self.running
        step = find_step(plan.timesteps, timestep, slack + SLACK, last)
        if step is None:
            where = "a bare transformer, whose scheduler the plug-in cannot see"
            if self.pipeline is not None:
                where = f"another pipeline than this {type(self.pipeline).__name__}, whose scheduler has none there"
            raise PlanError(
                f"plan: made for {plan.num_steps} steps of {plan.solver or 'its solver'}, none of them at timestep "
                f"{timestep:g}; the call comes from {where}; expected apply_dyndit on the pipeline that is called"
            )
        return step

    def evaluations(self, timestep: float) -> int:
        """Return how often the solver of the running call evaluates the step at this timestep."""
        nearest = min(self.times, key=lambda time: abs(time - timestep), default=timestep)
        return max(1, self.times.count(nearest))

    def _fitted(self, timestep: float, slack: float) -> DepthPlan:
        """Rescale the plan to the call's timesteps, unless the rest of the call has the plan's own timesteps.

        timestep: of the call's first step; a call that starts from a picture leaves out the steps before it.

        Raises:
            PlanError: the scheduler is another solver than the plan's, or the plan is for the pipeline's other expert.
        """
        times, plan = tuple(dict.fromkeys(self.times)), self.plan
        assert plan is not None  # steps are looked for in plans alone
        rest = times[min(range(len(times)), key=lambda k: abs(times[k] - timestep), default=0) :]
        if not rest or abs(rest[0] - timestep) > slack:
            return plan  # another scheduler's call: its timestep is looked for in the plan itself
        own = plan.timesteps[-len(rest) :]
        if len(own) == len(rest) and all(abs(a - b) <= SLACK for a, b in zip(own, rest, strict=True)):
            return plan
        if not are_own(self._seen, self._transformer, torch.tensor(plan.timesteps)).any():
            raise PlanError(
                f"plan: made for {plan.num_steps} steps, none of them at timesteps of this expert, which runs "
                f"{times[0]:g} to {times[-1]:g}; expected a plan made with it"
            )
        found = type(self._seen.scheduler).__name__
        if plan.solver and scheduler_class(plan.solver) != found:
            raise PlanError(
                f"plan: made for {plan.num_steps} steps of {plan.solver}, but the pipeline runs {len(times)} of "
                f"{found}; expected the plan's solver, which may take another number of steps, or its own timesteps"
            )
        if found in ANGLES:
            raise PlanError(
                f"plan: made for other timesteps, and {found}'s are angles, which no log-SNR belongs to; "
                f"expected a plan of {len(times)} steps made with it"
            )
        return plan.at(times, self.model.process)
