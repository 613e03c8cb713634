"""Plans improved by measurements: draw pictures under the neighbours of a plan, and go to the best of them.

A search trusts an additive prediction, and its plan is chosen on few pictures. Here the prediction only says which
neighbours to draw, and it is corrected at every plan on the way (`refined`). What is drawn decides, on other pictures
than the table's. A neighbour shares all steps before the first changed one, so these are drawn once for all neighbours
(`OwnSampler.variations`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import SearchSettings, limited, neighbours
from dyndit.plans.table import ShiftTable
from dyndit.progress import progress_bar
from dyndit.stats import Moments, frechet_distance

MeasureAround = Callable[[DepthPlan, Sequence[DepthPlan]], list[Moments]]
"""Measure the moments of the same pictures under a plan, then under each of several plans of other steps."""


@dataclass(frozen=True)
class Descent:
    """The effort of a descent.

    rounds: draws of neighbours; 0: none. width: neighbours per round. num_pictures: pictures per plan. searches: with
    other seeds, whose plans are drawn too, and the best of them is the start. scales: guidance scales to draw the last
    plan at; the best of these and its own stays.
    """

    rounds: int = 6
    width: int = 12
    num_pictures: int = 512
    searches: int = 1
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("width", 1), ("num_pictures", 1), ("searches", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"descent: {name} {value}, expected at least {least}")
        if 1 in self.scales:
            raise InputError("descent: guidance scale 1, which guides nothing; expected others")


def descended(
    table: ShiftTable,
    full: DepthPlan,
    plan: DepthPlan,
    measure: MeasureAround,
    *,
    base: Moments | None = None,
    starts: Sequence[DepthPlan] = (),
    descent: Descent | None = None,
    settings: SearchSettings | None = None,
) -> DepthPlan:
    """Return the best measured plan on the way from `plan`, within its budget.

    full: the full plan at the same steps. measure: on other pictures than the table's. base: as of the search that
    found the plan. starts: more plans within the budget, at the same steps; the best one measured is the start. Plans
    of another guidance scale are left out.

    A round that finds nothing better goes on with the next neighbours. `plan.figures` holds descended_fd, the distance
    on the pictures that chose the plan, which is optimistic, and descended_fd_from, that of the plan given.

    Raises:
        InputError: the plan has no budget, or no more pictures than features were measured.
    """
    descent, settings = descent or Descent(), settings or SearchSettings()
    if plan.budget is None:
        raise InputError("descent: the plan has no budget; expected a searched plan")
    alike = {one.steps: one for one in starts if one.cfg_scale == plan.cfg_scale and one.steps != plan.steps}
    budget, beginnings = plan.budget, [plan, *alike.values()]
    measured = measure(plan, beginnings[1:])
    if (num := measured[0].num) <= (size := len(table.reference.mean)):
        raise InputError(f"descent: {num} pictures for {size} features; expected more pictures than features")
    distances = [frechet_distance(one, table.reference) for one in measured]
    first, least = distances[0], min(distances)
    best = distances.index(least)
    plan, found = replace(beginnings[best], budget=budget), measured[best]
    seen = {one.steps for one in beginnings}
    title = f"improving {plan.num_steps} steps at {plan.budget:.3g}"
    with progress_bar(title, unit="rounds") as advance:
        for number in range(descent.rounds):
            advance(number, descent.rounds)
            around = [other for other in _around(table, full, plan, found, settings) if other.steps not in seen]
            around = around[: descent.width]
            if not around:
                break
            _, *measured = measure(plan, around)
            seen |= {other.steps for other in around}
            distances = [frechet_distance(one, table.reference) for one in measured]
            best = min(range(len(around)), key=distances.__getitem__)
            if distances[best] < least:
                plan, found, least = around[best], measured[best], distances[best]
        for scale in descent.scales:
            distance = frechet_distance(measure(replace(plan, cfg_scale=scale), [])[0], table.reference)
            if distance < least:
                plan, least = replace(plan, cfg_scale=scale), distance
        advance(descent.rounds, descent.rounds)
    figures = {name: value for name, value in plan.figures.items() if name != "calibrated_fd"}  # of the first plan
    figures |= {"descended_fd": least, "descended_fd_from": first}
    base = table.base_at(full.solver, full.num_steps) if base is None else base  # as the prediction of full depth
    predictor = Predictor(table, full.timesteps, base, full.calls)
    figures |= {"predicted_fd": predictor.predict(plan), "predicted_fd_full": predictor.predict(full)}
    figures |= {"predicted_share_of_time": table.cost.share_of_time(plan), "share_of_blocks": plan.share_of_blocks}
    return replace(plan, router="descended", figures=figures)


def _around(
    table: ShiftTable, full: DepthPlan, plan: DepthPlan, found: Moments, settings: SearchSettings
) -> list[DepthPlan]:
    """Return neighbours of a plan within its budget, the most promising first.  found: the plan's measured moments."""
    predictor = Predictor(table, full.timesteps, None, full.calls)
    predictor = Predictor(table, full.timesteps, predictor.base_through(plan, found), full.calls)
    assert plan.budget is not None  # `descended` has seen to it
    predictor, limit = limited(predictor, full, plan.budget, settings)
    candidates = neighbours(predictor, predictor.choice(plan), limit, settings)
    if not len(candidates):
        return []
    order = predictor.distances(candidates).argsort().tolist()
    steps = dict.fromkeys(tuple(predictor.choices[i] for i in candidates[row].tolist()) for row in order)
    return [plan.with_steps(others) for others in steps]
