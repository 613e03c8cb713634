"""Plans corrected by measuring a few: search, draw under what was found, move the prediction there, search again.

The additive prediction (`searched`) is exact at full depth and gets worse the further a plan is from it. Measured
moments of a plan p make it exact there instead:

    m(plan) = m_measured(p) + sum_b sum_q (A[b, q](plan) - A[b, q](p)) dm[b, q]        S likewise

A round costs one sampling of the table's pictures under a plan, far less than a table.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import search
from dyndit.plans.table import ShiftTable
from dyndit.stats import Moments, frechet_distance

Measure = Callable[[DepthPlan], Moments]
"""Moments of the features of pictures drawn under a plan, on the table's own seeds."""


def refined(
    table: ShiftTable,
    full: DepthPlan,
    budget: float,
    measure: Measure,
    *,
    rounds: int,
    base: Moments | None = None,
    smaller: Sequence[DepthPlan] = (),
) -> DepthPlan:
    """Of up to `rounds` + 1 plans the one that was measured best; a plan that is found again ends the search.

    base: moments of full depth at these very steps, as of `search`. smaller: plans that this found on this table at
    smaller budgets; they are started from, and the best of them stays where nothing that is dearer measures better.
    `plan.figures` holds calibrated_fd besides: the distance measured on the seeds that the plan was chosen on, which
    flatters it.

    Raises:
        InputError: rounds below 1; or as `search`.
    """
    if rounds < 1:
        raise InputError(f"--refinements {rounds}: expected at least 1")
    predictor, seen = Predictor(table, full.timesteps, base), set()
    measured_before = [plan for plan in smaller if "calibrated_fd" in plan.figures]
    best = min(measured_before, key=lambda plan: plan.figures["calibrated_fd"], default=None)
    least = math.inf if best is None else best.figures["calibrated_fd"]
    predicted_full = predictor.predict(full)
    for _ in range(rounds + 1):
        plan = search(table, full, budget, base=base, starts=smaller)
        if plan.steps in seen:
            break
        seen.add(plan.steps)
        found = measure(plan)
        distance = frechet_distance(found, table.reference)
        if distance < least:
            figures = plan.figures | {"calibrated_fd": distance, "predicted_fd_full": predicted_full}
            best, least = replace(plan, router="refined", figures=figures), distance
        base = predictor.base_through(plan, found)
    return replace(best, budget=budget)
