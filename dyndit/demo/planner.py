"""Plans within a visitor's budget, and the frontier that they are on."""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp, skips
from dyndit.plans.search import search
from dyndit.plans.table import ShiftTable
from dyndit.stats import frechet_distance

BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Budgets of the frontier's points."""
LEAST = 0.05
"""Least budget of a model without a table."""
MOST_KEPT = 512
"""Plans that are kept."""


@dataclass(frozen=True)
class Point:
    """A point of the frontier.  share: of full depth's time. fd: predicted Fréchet distance. name: printed at it."""

    share: float
    fd: float
    name: str = ""


class Planner:
    """Writes plans for one model: searched on its shift table, ramps of trained exits, or skips of untrained exits.

    lock: held during a search, so that no search slows a drawing that is timed.
    """

    def __init__(
        self, depths: tuple[int, ...], table: ShiftTable | None, *, trained: bool, lock: threading.Lock
    ) -> None:
        self.depths, self.table, self.trained = depths, table, trained
        self._lock = lock
        self._plans: dict[tuple[object, ...], DepthPlan] = {}

    @property
    def least_budget(self) -> float:
        """Return the share of time of the cheapest plan, rounded up to a hundredth."""
        return LEAST if self.table is None else min(1.0, math.ceil(100 * self.table.least_share) / 100)

    @property
    def usual_budget(self) -> float:
        """Return the budget to begin with. Untrained exits can leave out less."""
        return max(0.5 if self.trained else 0.75, self.least_budget)

    def searched_on(self, full: DepthPlan) -> ShiftTable | None:
        """Return the table if it serves this sampling: both are guided, or neither."""
        table = self.table
        return table if table is not None and (table.cfg_scale == 1) == (full.cfg_scale == 1) else None

    def predicted_by(self, full: DepthPlan) -> ShiftTable | None:
        """Return the table if it predicts distances of this sampling: it was measured at the same guidance scale."""
        return self.table if self.table is not None and self.table.cfg_scale == full.cfg_scale else None

    def plan(self, full: DepthPlan, budget: float) -> DepthPlan:
        """Return the best known plan within `budget`, a share of the full plan's time; at least the cheapest plan."""
        key = (full.timesteps, full.solver, full.cfg_scale, full.calls, budget)
        if key not in self._plans:
            table = self.searched_on(full)
            plan = self._scheduled(full, budget) if table is None else self._searched(table, full, budget)
            while len(self._plans) >= MOST_KEPT:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = plan
        return self._plans[key]

    def share_of_time(self, plan: DepthPlan) -> float:
        """Predict a plan's share of full depth's time; without a table, its share of the blocks."""
        return plan.share_of_blocks if self.table is None else self.table.cost.share_of_time(plan)

    def point(self, plan: DepthPlan) -> Point | None:
        """Return a plan's place on the frontier. Nothing was predicted for it: None."""
        fd = plan.figures.get("predicted_fd")
        return None if fd is None else Point(self.share_of_time(plan), fd)

    def frontier(self, full: DepthPlan) -> list[Point]:
        """Predict a point per budget of `BUDGETS`. Without a prediction: an empty list."""
        if self.predicted_by(full) is None:
            return []
        plans = (self.plan(full, budget) for budget in BUDGETS if budget >= self.least_budget)
        return [point for point in map(self.point, plans) if point is not None]

    def rivals(self, full: DepthPlan) -> list[Point]:
        """Return full depth at these steps, and at fewer steps, as far as the table has measured both."""
        if (table := self.predicted_by(full)) is None:
            return []
        if table.base_at(full.solver, full.num_steps) is None:
            return [Point(1.0, frechet_distance(table.base, table.reference), "full depth")]
        points: list[Point] = []
        for steps in table.step_counts(full.solver):
            base = table.base_at(full.solver, steps)
            if base is not None and steps <= full.num_steps:
                name = "full depth" if steps == full.num_steps else f"{steps} steps"
                points.append(Point(steps / full.num_steps, frechet_distance(base, table.reference), name))
        return points

    def caution(self, full: DepthPlan) -> str:
        """Say why nothing is predicted, or what the prediction takes from elsewhere; "" if neither."""
        if (table := self.predicted_by(full)) is not None:
            if table.base_at(full.solver, full.num_steps) is not None:
                return ""
            return f"Full depth's distance is that of {table.solver} at {table.num_steps} steps, where it was measured."
        if self.table is not None:
            return (
                f"The shift table was measured at guidance {self.table.cfg_scale:g}: at another, nothing is predicted."
            )
        if self.trained:
            return "No shift table, so plans are ramps and nothing is predicted. `dyndit calibrate` measures a table."
        return (
            "No trained exits: plans skip blocks and forecast what they would add. `dyndit distill` trains exits, "
            "`dyndit.distill_exits` those of a pipeline."
        )

    def _searched(self, table: ShiftTable, full: DepthPlan, budget: float) -> DepthPlan:
        """Search on the table. Smaller budgets' plans are starts, so a larger budget is never predicted to be worse."""
        smaller = [step for step in BUDGETS if self.least_budget <= step < budget][-1:]
        starts = [replace(self.plan(full, step), cfg_scale=table.cfg_scale) for step in smaller]
        measured = replace(full, cfg_scale=table.cfg_scale)
        with self._lock:
            found = search(table, measured, max(budget, table.least_share), starts=starts)
        return replace(found, cfg_scale=full.cfg_scale, figures={}) if self.predicted_by(full) is None else found

    def _scheduled(self, full: DepthPlan, budget: float) -> DepthPlan:
        """Return the deepest fixed schedule within the budget, of the first kind that has one; or the shallowest."""
        whole = replace(full, router="ramp" if self.trained else "skips")
        kinds = [[whole, *kind] for kind in self._schedules(full)]
        for plans in kinds:
            if fitting := [plan for plan in plans if self.share_of_time(plan) <= budget]:
                return max(fitting, key=self.share_of_time)
        return min((plan for plans in kinds for plan in plans), key=self.share_of_time)

    def _schedules(self, full: DepthPlan) -> Iterable[list[DepthPlan]]:
        """Return fixed schedules by kind, the gentlest kind first: a forecast's error grows with its reach."""
        depths = self.depths
        if self.trained:
            ends = [(first, full.num_blocks) for first in depths] + [(depths[0], last) for last in depths]
            return [[ramp(full, depths, *each) for each in ends]]
        return [[skips(full, depths, 1, last, every) for last in depths[:-1]] for every in range(2, 7)]
