"""Draw the same pictures at full depth and under a plan, step by step, for one visitor at a time."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.conditions import Value
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp
from dyndit.plans.search import search
from dyndit.plans.table import ShiftTable
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start, to_uint8
from dyndit.sampling.solvers import solvers_of

MOST_PICTURES, MOST_STEPS, MOST_SCALE, MOST_SEED = 8, 50, 20.0, 2**31 - 1
"""Bounds of a request: what a visitor may ask of the machine."""
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets of the frontier's points."""


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.  values: a condition per picture, for example labels. budget: share of the time."""

    values: tuple[Value, ...]
    seed: int = 0
    solver: str = "ddim"
    steps: int = 10
    cfg_scale: float = 1.5
    budget: float = 0.5

    def check(self) -> None:
        """Refuse what lies outside the bounds.

        Raises InputError: names the field, what was found and what is expected.
        """
        for name, value, least, most in (
            ("pictures", len(self.values), 1, MOST_PICTURES),
            ("seed", self.seed, 0, MOST_SEED),
            ("steps", self.steps, 1, MOST_STEPS),
            ("guidance scale", self.cfg_scale, 0, MOST_SCALE),
        ):
            if not (math.isfinite(value) and least <= value <= most):
                raise InputError(f"{name} {value:g}: expected {least:g} to {most:g}")
        if not 0 < self.budget <= 1:
            raise InputError(f"budget {self.budget:g}: expected above 0 and at most 1")


@dataclass(frozen=True)
class Side:
    """One side of the page.  pictures: uint8 (B, C, H, W) after `step` steps. seconds: of these steps together."""

    plan: DepthPlan
    step: int
    pictures: Tensor
    seconds: float


@dataclass(frozen=True)
class Point:
    """A point of the predicted frontier.  share: of full depth's time. fd: predicted Fréchet distance."""

    budget: float
    share: float
    fd: float


class Studio:
    """A model with exits, and what is known of its plans.

    table: the model's shift table; plans are searched on it. Without a table, plans are ramps. to_pictures: turns the
    sampler's last state into uint8 (B, C, H, W); latents need a decoder.
    """

    def __init__(
        self,
        model: DynamicDepth,
        table: ShiftTable | None = None,
        *,
        name: str = "model",
        to_pictures: Callable[[Tensor], Tensor] = to_uint8,
    ) -> None:
        if model.exits is None:
            raise InputError(f"{name}: has no exits; expected a model that `dyndit distill` made")
        if table is not None:
            model.check_identity(table.backbone, table.exits, origin=f"{name}: shift table")
        self.model, self.table, self.name, self._to_pictures = model, table, name, to_pictures
        self._lock = threading.Lock()
        # Searches take a second, and visitors move one slider.
        self._searched = lru_cache(maxsize=256)(self._plan)

    @property
    def solvers(self) -> list[str]:
        """List the solvers of the model's process."""
        return list(solvers_of(self.model.process))

    @property
    def least_budget(self) -> float:
        """Return the share of time of the cheapest plan, rounded up to a hundredth."""
        return 0.05 if self.table is None else min(1.0, math.ceil(100 * self.table.least_share) / 100)

    def full(self, request: Request) -> DepthPlan:
        """Return the plan of full depth. Raises InputError: the request does not fit the model."""
        request.check()
        return full_plan(self.model, request.solver, request.steps, request.cfg_scale)

    def plan(self, request: Request) -> DepthPlan:
        """Return the plan within the request's budget: searched on the table, or the deepest ramp that fits."""
        self.full(request)
        return self._searched(request.solver, request.steps, request.cfg_scale, request.budget)

    def _plan(self, solver: str, steps: int, cfg_scale: float, budget: float) -> DepthPlan:
        full = full_plan(self.model, solver, steps, cfg_scale)
        if self.table is not None:
            return search(self.table, full, max(budget, self.table.least_share))
        ramps = [ramp(full, self.model.depths, first) for first in self.model.depths]
        ramps += [ramp(full, self.model.depths, self.model.depths[0], last) for last in self.model.depths]
        fitting = [plan for plan in ramps if plan.share_of_blocks <= budget] or [min(ramps, key=_blocks)]
        return max(fitting, key=_blocks)

    def share_of_time(self, plan: DepthPlan) -> float:
        """Predict a plan's share of full depth's time; without a table, its share of the blocks."""
        return plan.share_of_blocks if self.table is None else self.table.cost.share_of_time(plan)

    def frontier(self, request: Request) -> list[Point]:
        """Predict a point per budget of `BUDGETS`. Without a table nothing is predicted: an empty list."""
        if self.table is None:
            return []
        full = self.full(request)
        budgets = [budget for budget in BUDGETS if budget >= self.least_budget]
        plans = [self._searched(request.solver, request.steps, request.cfg_scale, budget) for budget in budgets]
        points = [
            Point(budget, self.share_of_time(plan), plan.figures["predicted_fd"])
            for budget, plan in zip(budgets, plans, strict=True)
        ]
        best = plans[-1].figures["predicted_fd_full"] if plans else math.nan
        return [*points[:-1], Point(1.0, self.share_of_time(full), best)]

    def draw(self, request: Request) -> Iterator[tuple[Side, Side]]:
        """Yield (full depth, plan) after every step of both. Both start from the same noise.

        One request is drawn at a time, because two at once would falsify each other's times.
        """
        plans = (self.full(request), self.plan(request))
        condition = self.model.backbone.condition.of(request.values, next(self.model.parameters()).device)
        batch = Batch(condition, tuple(range(len(request.values))), request.seed)
        guidance, seconds = Guidance(request.cfg_scale), [0.0, 0.0]
        with self._lock:
            trajectories = [start(self.model, batch, request.solver, request.steps) for _ in plans]
            for step in range(request.steps):
                for side, (plan, trajectory) in enumerate(zip(plans, trajectories, strict=True)):
                    spent: list[float] = []
                    hook = lambda _k, whole, _network, spent=spent: spent.append(whole)  # noqa: E731
                    advance(self.model, batch, trajectory, plan, guidance, first=step, stop=step + 1, on_step=hook)
                    seconds[side] += sum(spent)
                pictures = [self._to_pictures(trajectory.x).cpu() for trajectory in trajectories]
                full, dynamic = (
                    Side(*entries) for entries in zip(plans, (step + 1,) * 2, pictures, seconds, strict=True)
                )
                yield full, dynamic


def _blocks(plan: DepthPlan) -> float:
    return plan.share_of_blocks
