"""Search plans on a shift table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan, Router
from dyndit.plans.predictor import Predictor
from dyndit.plans.schedules import ramp
from dyndit.plans.table import ShiftTable
from dyndit.progress import progress_bar
from dyndit.stats import Moments


@dataclass(frozen=True)
class SearchSettings:
    """The effort of a search.

    num_kicks: restarts from the best plan with a third of its steps made random. evaluations: exact evaluations per
    move. max_units: longer plans move steps in groups of neighbours, so that 250 steps search as quickly as 25. seed:
    of the kicks. whole: plans may take the original model's own step; False: the table's choices alone.
    """

    num_starts: int = 6
    num_kicks: int = 4
    evaluations: int = 48
    max_units: int = 25
    max_moves: int = 400
    seed: int = 0
    whole: bool = True


def search(
    table: ShiftTable,
    full: DepthPlan,
    budget: float,
    *,
    base: Moments | None = None,
    settings: SearchSettings | None = None,
    starts: Sequence[DepthPlan] = (),
) -> DepthPlan:
    """Find the plan of least predicted Fréchet distance within `budget`, a share of the full plan's predicted time.

    base: moments of full depth at these steps; by default the table's moments at these steps, else its own base.
    starts: more plans of the same steps to start from; plans above the budget are ignored.

    A local search from ramps, constants of every choice and the cheapest plan. Every move changes one or two steps.
    Moves are ranked by their first-order effect. The top moves are evaluated exactly, and the best move is taken.

    Raises:
        InputError: the budget is outside (0, 1], or below the cheapest plan.
    """
    if not 0 < budget <= 1:
        raise InputError(f"--budget {budget:g}: expected above 0 and at most 1")
    settings = settings or SearchSettings()
    base = table.base_at(full.solver, full.num_steps) if base is None else base
    predictor, limit = limited(Predictor(table, full.timesteps, base, full.calls), full, budget, settings)
    if budget < table.least_share * (1 - 1e-9):
        raise InputError(f"--budget {budget:g}: the cheapest plan of this model needs {table.least_share:.2f}")
    given = [predictor.choice(plan) for plan in starts]
    given = [choice for choice in given if predictor.spent(choice) <= limit]
    given += _starts(predictor, full, limit, settings.num_starts)
    best, best_value = _best(predictor, given, limit, settings, f"searching {full.num_steps} steps at {budget:.3g}")
    bound = {"backbone": table.backbone, "exits": table.exits}
    plan = full.with_steps([predictor.choices[i] for i in best.tolist()], router="searched", budget=budget, **bound)
    figures = {
        "predicted_fd": best_value,
        "predicted_fd_full": predictor.predict(full),
        "predicted_share_of_time": table.cost.share_of_time(plan),
        "share_of_blocks": plan.share_of_blocks,
    }
    return replace(plan, figures=figures)


def limited(predictor: Predictor, full: DepthPlan, budget: float, settings: SearchSettings) -> tuple[Predictor, float]:
    """Return the predictor with what the settings forbid beyond any budget, and the seconds that the budget allows."""
    limit = budget * predictor.seconds[-1].item() * sum(full.calls_by_step) * (1 + 1e-9)
    if not settings.whole:
        predictor.seconds[-1] = 2 * limit
    return predictor, limit


Ends = dict[tuple[int, ...], tuple[Tensor, float]]
"""Plans on the paths of a search -> where the path ended: a choice, (K,), and its predicted distance."""


def _best(
    predictor: Predictor, starts: Sequence[Tensor], limit: float, settings: SearchSettings, title: str
) -> tuple[Tensor, float]:
    """Improve every start, then the best one after each kick -> the best choice (K,), its predicted distance."""
    ends: Ends = {}
    with progress_bar(title, unit="starts") as advance:
        found, total = [], len(starts) + settings.num_kicks
        for choice in starts:
            advance(len(found), total)
            found.append(_improve(predictor, choice, limit, settings, ends))
        best, best_value = min(found, key=lambda improved: improved[1])
        kicks = torch.Generator().manual_seed(settings.seed)
        for kick in range(settings.num_kicks):
            advance(len(found) + kick, total)
            choice, value = _improve(predictor, _kicked(predictor, best, limit, kicks), limit, settings, ends)
            if value < best_value:
                best, best_value = choice, value
        advance(total, total)
    return best, best_value


def _starts(predictor: Predictor, full: DepthPlan, limit: float, num: int) -> list[Tensor]:
    """Return ramps and constants within the budget, best predicted first, then the cheapest plan."""
    plain = [choice for choice in predictor.choices if not choice.forecast]
    depths = tuple(sorted({choice.depth for choice in plain}))
    plans = [full.with_steps([choice] * full.num_steps) for choice in plain]
    plans += [ramp(full, depths, *ends, power) for ends in combinations(depths, 2) for power in (0.5, 1.0, 2.0)]
    choices = torch.stack([predictor.choice(plan) for plan in plans] + _periodic(predictor, full.num_steps))
    choices = choices[predictor.spent(choices) <= limit]
    cheapest = torch.full((full.num_steps,), int(predictor.seconds.argmin()))
    if not len(choices):
        return [cheapest]
    order = predictor.distances(choices).argsort()[:num]
    return [*choices[order], cheapest]


def _periodic(predictor: Predictor, num_steps: int) -> list[Tensor]:
    """Return plans with full depth every second, third, ... step, up to the oldest age, and a forecast between."""
    if predictor.entries is None:
        return []
    full, plans = len(predictor.choices) - 1, []
    for index in (i for i, choice in enumerate(predictor.choices) if choice.forecast):
        for period in range(2, predictor.entries.oldest + 2):
            steps = torch.arange(num_steps)
            plans.append(predictor.settled(torch.where(steps % period == 0, full, index)[None])[0])
    return plans


def _kicked(predictor: Predictor, choice: Tensor, limit: float, generator: torch.Generator) -> Tensor:
    """Set a third of the steps to random choices, then random steps to the cheapest until the budget holds."""
    before, choice, steps = choice, choice.clone(), len(choice)
    order = torch.randperm(steps, generator=generator)
    moved = order[: max(1, steps // 3)]
    choice[moved] = torch.randint(len(predictor.choices), (len(moved),), generator=generator)
    for step in order.flip(0).tolist():
        if predictor.spent(choice) <= limit:
            break
        choice[step] = predictor.seconds.argmin()
    settled = predictor.settled(choice[None])[0]
    return settled if predictor.spent(settled) <= limit else before


def _improve(
    predictor: Predictor, choice: Tensor, limit: float, settings: SearchSettings, ends: Ends
) -> tuple[Tensor, float]:
    """Search locally from one plan.  choice: (K,) -> the improved choice (K,), its predicted distance.

    ends: where paths have ended, and is added to. A plan has one best move, so paths that meet go on as one.
    """
    path = [tuple(choice.tolist())]
    if path[0] in ends:
        return ends[path[0]]
    value = predictor.distances(choice[None]).item()
    for _ in range(settings.max_moves):
        candidates = neighbours(predictor, choice, limit, settings)
        if not len(candidates):
            break
        values = predictor.distances(candidates)
        best = int(values.argmin())
        if values[best].item() >= value - 1e-9:
            break
        choice, value = candidates[best], values[best].item()
        if (here := tuple(choice.tolist())) in ends:
            choice, value = ends[here]
            break
        path.append(here)
    ends.update(dict.fromkeys(path, (choice, value)))
    return choice, value


def neighbours(predictor: Predictor, choice: Tensor, limit: float, settings: SearchSettings) -> Tensor:
    """Return the plans one or two moves away that promise most at first order.  choice: (K,) -> (M, K).

    limit: seconds that no plan may exceed. A move changes a step, or a group of neighbours in a long plan.
    """
    num_steps, num_choices = len(choice), len(predictor.choices)
    units = np.array_split(np.arange(num_steps), min(num_steps, settings.max_units))
    member = torch.block_diag(*(torch.ones(1, len(unit), dtype=torch.float64) for unit in units))  # (U, K)
    slopes = predictor.slopes(choice)
    gain = member @ (slopes - slopes.gather(1, choice[:, None]))  # (U, P): first-order change
    cost = member @ (predictor.calls[:, None] * (predictor.seconds[None, :] - predictor.seconds[choice][:, None]))
    spare = limit - predictor.spent(choice).item()
    moves = _ranked_moves(gain.flatten(), cost.flatten(), spare, num_choices, settings.evaluations)
    candidates = choice.repeat(len(moves), 1)
    for row, move in enumerate(moves):
        for flat in move:
            candidates[row, units[flat // num_choices]] = flat % num_choices
    if predictor.entries is not None:  # a forecast may lose the full-depth step that it builds on
        candidates = torch.cat([predictor.settled(candidates), *_programmed(predictor, choice, limit)])
        candidates = candidates[predictor.spent(candidates) <= limit]
    return candidates


def _programmed(predictor: Predictor, choice: Tensor, limit: float) -> list[Tensor]:
    """Find plans within the budget around one plan by the dynamic program.  choice: (K,) -> (1, K) each.

    First-order changes hold only near their plan. So each changed choice pays `reluctance` times the median change.
    Bisection finds the price of a second.
    """
    values, plans = predictor.entry_slopes(choice), []
    entries = predictor.entries
    assert entries is not None  # of tables with ages
    stay = entries.taken(choice[None])[1][0]
    gained = values - values.gather(1, stay[:, None])
    scale = gained.abs().median().item()
    for reluctance in (0.0, 0.3, 1.0, 3.0):
        costly = gained + reluctance * scale
        costly[torch.arange(len(stay)), stay] = 0.0
        low, high = 0.0, 1e3 * scale / predictor.seconds.min().item()
        for _ in range(30):
            price = (low + high) / 2
            found = entries.programmed(costly, predictor.seconds, price)
            if predictor.spent(found) <= limit:
                high, kept = price, found
                plans.append(kept[None])
            else:
                low = price
    return list({tuple(plan[0].tolist()): plan for plan in plans}.values())


def _ranked_moves(gain: Tensor, cost: Tensor, spare: float, num_choices: int, num: int) -> list[tuple[int, ...]]:
    """Return the most promising single and double moves within the spare time, by first-order change.

    gain, cost: (U * P,); the index of a move is unit * P + choice. A small table (up to 64 moves) returns all moves.
    """
    singles = torch.nonzero(cost <= spare).flatten()
    moves: list[tuple[float, tuple[int, ...]]] = [
        (float(gain[i]), (int(i),)) for i in singles[gain[singles].argsort()[:num]]
    ]
    # Double moves: one of the best buys, with another of the best buys or of the cheapest sales.
    keep = min(len(gain), 128)
    buy = gain.argsort()[:keep]
    sell = (gain / cost.abs().clamp(min=1e-12)).masked_fill(cost >= 0, torch.inf).argsort()[:keep]
    other = torch.cat([buy, sell]).unique()
    fits = cost[buy][:, None] + cost[other][None, :] <= spare
    apart = (buy // num_choices)[:, None] != (other // num_choices)[None, :]
    total = (gain[buy][:, None] + gain[other][None, :]).masked_fill(~(fits & apart), torch.inf).flatten()
    for flat in total.argsort()[: num if len(gain) > 64 else None].tolist():
        if total[flat] == torch.inf:
            break
        double = sorted((int(buy[flat // len(other)]), int(other[flat % len(other)])))
        moves.append((float(total[flat]), tuple(double)))
    moves.sort(key=lambda move: move[0])
    if len(gain) > 64:
        # Keep single moves even if the first-order sums of double moves look better.
        moves = moves[:num] + [move for move in moves[num:] if len(move[1]) == 1][: num // 2]
    return list(dict.fromkeys(move for _, move in moves))


def router(table: ShiftTable, budget: float) -> Router:
    """Return a router that searches a plan on this table within `budget`: `plan=router(table, 0.6)`.

    The times in the table belong to the machine that measured it.
    """
    return lambda full, _depths: search(table, full, budget)
