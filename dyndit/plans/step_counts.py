"""Choose the step count together with the plan, under one limit of time or of distance.

A plan at half depth with twice the steps takes about as long as full depth. One table predicts the better plan. The
additive prediction (`searched`) starts from full depth's measured moments at each step count (`ShiftTable.bases`), and
seconds compare across step counts. The search covers every measured step count and full depth, and takes the best plan.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.search import search
from dyndit.plans.table import ShiftTable

ROUTER = "chosen"

TimestepsAt = Callable[[int], tuple[float, ...]]
"""Map a number of steps to the solver's timesteps: `functools.partial(timesteps_of, solver)`."""


@dataclass(frozen=True)
class LatencyBudget:
    """The goal of least predicted distance within a share of full depth's time at `reference_steps`.

    reference_steps: by default the table's own number of steps.
    """

    share: float
    reference_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"--latency-budget {self.share:g}: expected above 0 and at most 1")
        _check_reference(self.reference_steps)

    @property
    def label(self) -> str:
        """Return a short name for files."""
        return f"b{self.share:g}" + ("" if self.reference_steps is None else f"-of{self.reference_steps}")

    def choose(self, table: ShiftTable, solver: str, timesteps_at: TimestepsAt) -> DepthPlan:
        """Return the best plan over all step counts. Raises InputError if no plan is quick enough, or none measured."""
        limit = self.share * _reference(table, self.reference_steps)
        fulls = _fulls(table, solver, timesteps_at)
        plans = [plan for full in fulls if (plan := _best(table, full, limit)) is not None]
        if not plans:
            least = min(table.step_counts(solver))
            share = table.least_share * _reference(table, least) / _reference(table, self.reference_steps)
            raise InputError(
                f"--latency-budget {self.share:g}: the cheapest plan, at {least} steps, needs {share:.2g} of full "
                f"depth's time at {self.reference_steps or table.num_steps}"
            )
        best = min(plans, key=lambda plan: plan.figures["predicted_fd"])
        return _described(best, table, self.reference_steps, latency_budget=self.share)


@dataclass(frozen=True)
class TargetFD:
    """The goal of least predicted time at a predicted distance of at most `value`.

    Bisection over budgets finds the cheapest plan, to within `tolerance` of full depth's time at the same steps.
    reference_steps: the plan's time is reported as a share of full depth's time there; by default the table's steps.
    """

    value: float
    reference_steps: int | None = None
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise InputError(f"--target-fd {self.value:g}: expected a distance above 0")
        _check_reference(self.reference_steps)

    @property
    def label(self) -> str:
        """Return a short name for files."""
        return f"fd{self.value:g}"

    def choose(self, table: ShiftTable, solver: str, timesteps_at: TimestepsAt) -> DepthPlan:
        """Return the cheapest good plan over all step counts. Raises InputError if none is good, or none measured."""
        cheapest, limit, missed = None, math.inf, []
        for full in _fulls(table, solver, timesteps_at):
            plan = _best(table, full, limit)  # the best at this step count in the time of the cheapest plan so far
            if plan is not None and plan.figures["predicted_fd"] <= self.value:
                cheapest = self._cheapest(table, full, plan)
                limit = table.cost.plan_seconds(cheapest)
            elif plan is not None:
                missed.append((plan.figures["predicted_fd"], plan.num_steps))
        if cheapest is None:
            least, steps = min(missed)
            raise InputError(f"--target-fd {self.value:g}: the least predicted is {least:.4g}, at {steps} steps")
        return _described(cheapest, table, self.reference_steps, target_fd=self.value)

    def _cheapest(self, table: ShiftTable, full: DepthPlan, good: DepthPlan) -> DepthPlan:
        """Bisect from a good plan to the cheapest good plan, assuming that a better plan is never cheaper."""
        whole = table.cost.plan_seconds(full)
        low, high = table.least_share * whole, table.cost.plan_seconds(good)
        while high - low > self.tolerance * whole:
            middle = (low + high) / 2
            plan = _best(table, full, middle)
            if plan is not None and plan.figures["predicted_fd"] <= self.value:
                good, high = plan, table.cost.plan_seconds(plan)
            else:
                low = middle
        return good


Goal = LatencyBudget | TargetFD
"""The goal that chooses the step count and the plan."""


def frontier(
    table: ShiftTable,
    solver: str,
    timesteps_at: TimestepsAt,
    shares: Sequence[float],
    reference_steps: int | None = None,
) -> pd.DataFrame:
    """Search the best plan per share of the reference time and step count. Without a plan quick enough, omit the row.

    Columns: latency_budget (the requested share), steps, budget (share of full depth's time at these steps),
    predicted_ms (per picture), predicted_fd, share_of_blocks.
    """
    rows = []
    for share in shares:
        limit = share * _reference(table, reference_steps)
        for full in _fulls(table, solver, timesteps_at):
            if (plan := _best(table, full, limit)) is not None:
                ms = 1e3 * table.cost.plan_seconds(plan) / table.cost.batch_size
                budget, distance = (plan.figures[name] for name in ("predicted_share_of_time", "predicted_fd"))
                rows.append((share, plan.num_steps, budget, ms, distance, plan.share_of_blocks))
    columns = ["latency_budget", "steps", "budget", "predicted_ms", "predicted_fd", "share_of_blocks"]
    return pd.DataFrame(rows, columns=columns)


def _fulls(table: ShiftTable, solver: str, timesteps_at: TimestepsAt) -> list[DepthPlan]:
    """Return the full plan at every measured step count, fewest steps first. Raises InputError if there is none."""
    counts = table.step_counts(solver)
    if not counts:
        raise InputError(
            f"--solver {solver}: the shift table has no moments of full depth with it to choose a step count by; "
            f"expected some, which `dyndit calibrate --solver {solver} --step-grid` measures"
        )
    return [DepthPlan.full(timesteps_at(steps), table.num_blocks, solver, table.cfg_scale) for steps in counts]


def _best(table: ShiftTable, full: DepthPlan, seconds: float) -> DepthPlan | None:
    """Search the plan of least predicted distance within this time; None if the cheapest plan takes longer."""
    share = seconds / table.cost.plan_seconds(full)
    budget = 1.0 if share > 1 - 1e-9 else share
    if budget < table.least_share * (1 - 1e-9):
        return None
    plan = replace(search(table, full, budget), router=ROUTER)
    if budget == 1 and plan.figures["predicted_fd_full"] <= plan.figures["predicted_fd"]:
        whole = {"predicted_share_of_time": 1.0, "share_of_blocks": 1.0}
        figures = plan.figures | {"predicted_fd": plan.figures["predicted_fd_full"]} | whole
        plan = plan.with_steps(full.steps, figures=figures)
    return plan


def _described(plan: DepthPlan, table: ShiftTable, reference_steps: int | None, **asked: float) -> DepthPlan:
    """Add the request and the plan's share of the reference time to the plan's figures."""
    figures = {
        **asked,
        "reference_steps": float(reference_steps or table.num_steps),
        "predicted_share_of_reference": table.cost.plan_seconds(plan) / _reference(table, reference_steps),
    }
    return replace(plan, figures=plan.figures | figures)


def _check_reference(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise InputError(f"--reference-steps {steps}: expected at least 1")


def _reference(table: ShiftTable, steps: int | None) -> float:
    """Predict the seconds of full depth at these steps (default: the table's)."""
    return (steps or table.num_steps) * table.cost.step_seconds(table.full_step)
