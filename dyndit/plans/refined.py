"""Plans corrected by measurements: search a plan, draw pictures under it, correct the prediction, search again.

The additive prediction (`searched`) is exact at full depth and gets worse the further a plan is from full depth.
Measured moments of a plan p make the prediction exact at p instead:

    m(plan) = m_measured(p) + sum_b sum_q (A[b, q](plan) - A[b, q](p)) dm[b, q]        S in the same way

A round costs one sampling of the table's pictures under a plan, far less than a table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import SearchSettings, search
from dyndit.plans.table import ShiftTable
from dyndit.stats import Moments, frechet_distance

Measure = Callable[[DepthPlan], Moments]
"""Measure the features' moments for pictures drawn under a plan, on the table's own seeds."""


def refined(
    table: ShiftTable,
    full: DepthPlan,
    budget: float,
    measure: Measure,
    *,
    rounds: int,
    base: Moments | None = None,
    smaller: Sequence[DepthPlan] = (),
    settings: SearchSettings | None = None,
) -> DepthPlan:
    """Return the best measured of up to `rounds` + 1 plans. A plan found twice ends the search.

    base: moments of full depth at these steps, see `search`. smaller: plans that this function found on this table at
    smaller budgets. The search also starts from them, and returns the best of them if no dearer plan measures better.
    `plan.figures` also holds calibrated_fd, the distance measured on the seeds that chose the plan. It is optimistic.

    Raises:
        InputError: rounds below 1, or an error of `search`.
    """
    if rounds < 1:
        raise InputError(f"--refinements {rounds}: expected at least 1")
    predictor, seen = Predictor(table, full.timesteps, base, full.calls), set()
    measured_before = [plan for plan in smaller if "calibrated_fd" in plan.figures]
    best = min(measured_before, key=lambda plan: plan.figures["calibrated_fd"], default=None)
    least = math.inf if best is None else best.figures["calibrated_fd"]
    predicted_full = predictor.predict(full)
    for _ in range(rounds + 1):
        plan = search(table, full, budget, base=base, settings=settings, starts=smaller)
        if plan.steps in seen:
            break
        seen.add(plan.steps)
        found = measure(plan)
        distance = frechet_distance(found, table.reference)
        if distance < least:
            figures = plan.figures | {"calibrated_fd": distance, "predicted_fd_full": predicted_full}
            best, least = replace(plan, router="refined", figures=figures), distance
        base = predictor.base_through(plan, found)
    assert best is not None  # the first plan is below infinity
    return replace(best, budget=budget)
