"""Steps and depth together: the step count is chosen with the plan, under one limit of time or of distance.

A plan at half depth and twice the steps takes about as long as full depth at the steps themselves. Which of them makes
the better pictures is read from one table: the additive prediction (`searched`) starts from full depth's own moments at
each step count, which the table holds where they were measured (`ShiftTable.bases`), and its seconds are comparable
across step counts. So plans of every such step count are searched, and the best of them, full depth among them, is it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.search import search
from dyndit.plans.table import ShiftTable
from dyndit.process import DDPM, Process
from dyndit.sampling.solvers import AnySolver, solver_name, timesteps_of

ROUTER = "chosen"


@dataclass(frozen=True)
class LatencyBudget:
    """The least predicted distance within a share of a reference time: full depth's at `reference_steps`.

    reference_steps: by default those that the table was measured at.
    """

    share: float
    reference_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"--latency-budget {self.share:g}: expected above 0 and at most 1")
        _check_reference(self.reference_steps)

    @property
    def label(self) -> str:
        """A short name, for files."""
        return f"b{self.share:g}" + ("" if self.reference_steps is None else f"-of{self.reference_steps}")

    def choose(self, table: ShiftTable, solver: AnySolver, process: Process = DDPM()) -> DepthPlan:
        """The plan, at the step count that it is best at.

        Raises:
            InputError: the table holds no moments of full depth with this solver, or no plan is that quick.
        """
        limit = self.share * _reference(table, self.reference_steps)
        found = [_best(table, full, limit) for full in _fulls(table, solver, process)]
        plans = [plan for plan in found if plan is not None]
        if not plans:
            least = min(table.step_counts(solver_name(solver)))
            share = table.least_share * _seconds(table, least) / _reference(table, self.reference_steps)
            raise InputError(
                f"--latency-budget {self.share:g}: the cheapest plan, at {least} steps, needs {share:.2g} of full "
                f"depth's time at {_steps(table, self.reference_steps)}"
            )
        best = min(plans, key=lambda plan: plan.figures["predicted_fd"])
        return _described(best, table, self.reference_steps, latency_budget=self.share)


@dataclass(frozen=True)
class TargetFD:
    """The least predicted time at a predicted distance of at most `value`.

    The cheapest is found by bisection over budgets, to within `tolerance` of full depth's time at the same steps.
    reference_steps: of full depth whose time the plan's is told as a share of, by default the table's.
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
        """A short name, for files."""
        return f"fd{self.value:g}"

    def choose(self, table: ShiftTable, solver: AnySolver, process: Process = DDPM()) -> DepthPlan:
        """The plan, at the step count that it is cheapest at.

        Raises:
            InputError: the table holds no moments of full depth with this solver, or predicts no plan to be that good.
        """
        cheapest, limit, missed = None, math.inf, []
        for full in _fulls(table, solver, process):
            plan = _best(table, full, limit)  # what this step count can do in the time of the cheapest so far
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
        """The cheapest plan that is good enough, from one that is; a better plan is taken never to be cheaper."""
        whole = table.cost.plan_seconds(full)
        low, high = table.least_share * whole, table.cost.plan_seconds(good)
        while high - low > self.tolerance * whole:
            middle = (low + high) / 2
            plan = _best(table, full, middle)
            if plan.figures["predicted_fd"] <= self.value:
                good, high = plan, table.cost.plan_seconds(plan)
            else:
                low = middle
        return good


Goal = LatencyBudget | TargetFD
"""What steps and plan are chosen for."""


def frontier(
    table: ShiftTable,
    solver: AnySolver,
    shares: Sequence[float],
    reference_steps: int | None = None,
    process: Process = DDPM(),
) -> pd.DataFrame:
    """What each step count reaches within each share of the reference time: a row for each that has a plan that quick.

    Columns: latency_budget (the share asked for), steps, budget (of full depth's time at these steps), predicted_ms
    (per picture), predicted_fd, share_of_blocks.

    Raises:
        InputError: the table holds no moments of full depth with this solver.
    """
    rows = []
    for share in shares:
        limit = share * _reference(table, reference_steps)
        for full in _fulls(table, solver, process):
            plan = _best(table, full, limit)
            if plan is not None:
                rows.append(
                    {
                        "latency_budget": share,
                        "steps": plan.num_steps,
                        "budget": plan.figures["predicted_share_of_time"],
                        "predicted_ms": 1e3 * table.cost.plan_seconds(plan) / table.cost.batch_size,
                        "predicted_fd": plan.figures["predicted_fd"],
                        "share_of_blocks": plan.share_of_blocks,
                    }
                )
    columns = ["latency_budget", "steps", "budget", "predicted_ms", "predicted_fd", "share_of_blocks"]
    return pd.DataFrame(rows, columns=columns)


def _fulls(table: ShiftTable, solver: AnySolver, process: Process) -> list[DepthPlan]:
    """Full depth at every step count that the table can predict from, fewest steps first."""
    name = solver_name(solver)
    counts = table.step_counts(name)
    if not counts:
        raise InputError(
            f"--solver {name}: the shift table has no moments of full depth with it to choose a step count by; "
            f"expected some, which `dyndit calibrate --solver {name} --step-grid` measures"
        )
    times = [timesteps_of(solver, steps, process) for steps in counts]
    return [DepthPlan.full(timesteps, table.num_blocks, name, table.cfg_scale) for timesteps in times]


def _best(table: ShiftTable, full: DepthPlan, seconds: float) -> DepthPlan | None:
    """The plan of least predicted distance within this time at these steps; None where the cheapest takes longer."""
    share = seconds / table.cost.plan_seconds(full)
    budget = 1.0 if share > 1 - 1e-9 else share
    if budget < table.least_share * (1 - 1e-9):
        return None
    plan = replace(search(table, full, budget), router=ROUTER)
    if budget == 1 and plan.figures["predicted_fd_full"] <= plan.figures["predicted_fd"]:
        figures = {
            "predicted_fd": plan.figures["predicted_fd_full"],
            "predicted_share_of_time": 1.0,
            "share_of_blocks": 1.0,
        }
        plan = replace(plan.with_pairs(full.pairs), figures=plan.figures | figures)
    return plan


def _described(plan: DepthPlan, table: ShiftTable, reference_steps: int | None, **asked: float) -> DepthPlan:
    """The plan with what was asked for, and its time as a share of the reference's, among its figures."""
    figures = {
        **asked,
        "reference_steps": float(_steps(table, reference_steps)),
        "predicted_share_of_reference": table.cost.plan_seconds(plan) / _reference(table, reference_steps),
    }
    return replace(plan, figures=plan.figures | figures)


def _check_reference(steps: int | None) -> None:
    if steps is not None and not 1 <= steps <= Process.num_timesteps:
        raise InputError(f"--reference-steps {steps}: expected 1 to {Process.num_timesteps}")


def _steps(table: ShiftTable, reference_steps: int | None) -> int:
    return table.num_steps if reference_steps is None else reference_steps


def _seconds(table: ShiftTable, steps: int) -> float:
    """Predicted seconds of full depth."""
    return steps * table.cost.step_seconds(*table.full_pair)


def _reference(table: ShiftTable, reference_steps: int | None) -> float:
    return _seconds(table, _steps(table, reference_steps))
