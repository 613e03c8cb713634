"""The searched router: plans found on a table of paired-seed distribution shifts.

The table holds, for each band of timesteps b and each pair of depths p, how the mean and the second moment of the
pictures' features change when only the steps of that band are run at those depths, everything else at full depth, on
the same seeds. To first order the changes add up over a plan:

    m(plan) = m_full + sum_b sum_p A[b, p] dm[b, p]        S(plan) = S_full + sum_b sum_p A[b, p] dS[b, p]

where A[b, p] is the share of band b that the plan runs at p. The Fréchet distance of (m, S - m m^T) to the
reference is the prediction; a local search minimises it under a budget of measured time.

A pair that forecasts has an entry for each age: how many steps ago full depth was. Which of them a step takes follows
from the steps before it, so a choice of pairs is read from the first step to the last (`ages`), and a dynamic
program over that age proposes plans to the local search.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyndit.analysis.metrics.fidelity import FrechetTo, Moments
from dyndit.errors import CheckpointError, InputError
from dyndit.plans.ages import AgedEntries
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan, Router, own_exit
from dyndit.plans.schedules import ramp

FORMAT = "dyndit-shift-table"
VERSION = 1
FILE = "shift-table.safetensors"
"""Its name in a model's folder."""
"""What the names of their tensors begin with."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class ShiftTable:
    """Measured distribution shifts of a model, and what they were measured with.

    edges: bands + 1 timesteps, falling; band b covers (edges[b + 1], edges[b]]. pairs: P (conditional,
    unconditional) depths without the full pair, whose shift is zero. mean: (bands, P, F), second:
    (bands, P, F, F), float64, of F features; base and reference: moments of full depth's and of real pictures.
    """

    edges: tuple[float, ...]
    pairs: tuple[Pair, ...]
    mean: Tensor
    second: Tensor
    base: Moments
    reference: Moments
    cost: CostModel
    num_blocks: int
    solver: str
    num_steps: int
    cfg_scale: float
    seed: int
    num_pictures: int
    extractor: str
    extractor_fingerprint: str
    trunk: str = ""
    exits: str = ""
    projection: Tensor | None = None
    """Directions the extractor's features were reduced to, where they were."""
    ages: tuple[int, ...] = ()
    """Of each pair, where some forecast: how many steps ago full depth was, 0 for those that do not."""
    bases: Mapping[tuple[str, int], Moments] = field(default_factory=dict, compare=False)
    """Moments of full depth at other (solver, steps) than `base`'s, on the same seeds, where they were measured."""

    @property
    def full_pair(self) -> Pair:
        """The depths of the original model."""
        return (self.num_blocks, self.num_blocks if self.cfg_scale != 1 else 0)

    @property
    def extractor_name(self) -> str:
        """The extractor's own name, where its features were reduced too."""
        return self.extractor if self.projection is None else self.extractor.rsplit("-pca", 1)[0]

    @property
    def num_bands(self) -> int:
        """Number of bands."""
        return len(self.edges) - 1

    @property
    def least_share(self) -> float:
        """Predicted time of the cheapest plan, as a share of full depth's: no budget can be smaller."""
        seconds = [self.cost.step_seconds(*pair) for pair in (*self.pairs, self.full_pair)]
        return min(seconds) / seconds[-1]

    def base_at(self, solver: str, num_steps: int) -> Moments | None:
        """Moments of full depth at these very steps, where they were measured."""
        own = (solver, num_steps) == (self.solver, self.num_steps)
        return self.base if own else self.bases.get((solver, num_steps))

    def step_counts(self, solver: str) -> tuple[int, ...]:
        """The step counts of a solver at which full depth was measured, fewest first."""
        measured = {(self.solver, self.num_steps), *self.bases}
        return tuple(sorted(steps for name, steps in measured if name == solver))

    def part(self, pairs: Sequence[Pair], ages: Sequence[int] = ()) -> Self | None:
        """The table of these pairs alone, each at its age where some forecast; None where it lacks one of them.

        That is what would have been measured of them, bit for bit: an entry does not depend on the others.
        """
        where = {key: i for i, key in enumerate(zip(self.pairs, self.ages or (0,) * len(self.pairs), strict=True))}
        picks = [where.get(key) for key in zip(pairs, ages or (0,) * len(pairs), strict=True)]
        if None in picks:
            return None
        shifts = {"mean": self.mean[:, picks], "second": self.second[:, picks]}
        return replace(self, pairs=tuple(pairs), ages=tuple(ages), **shifts)

    def weights(self, timesteps: Sequence[int]) -> Tensor:
        """(K, bands): which share of each band every step covers.

        Step k covers the timesteps from its own down to the next step's, the last one down to 0. With these weights
        one table serves other step counts and solvers.
        """
        tops = torch.tensor([float(t) for t in timesteps], dtype=torch.float64)
        bottoms = torch.cat([tops[1:], tops.new_zeros(1)])
        edges = torch.tensor(self.edges, dtype=torch.float64)
        high, low = edges[:-1], edges[1:]
        overlap = torch.minimum(tops[:, None], high) - torch.maximum(bottoms[:, None], low)
        # A band that ends where it begins (a last step at t = 0) belongs whole to the step that stands there.
        own = (tops[:, None] == high).double()
        return torch.where(high > low, overlap.clamp(min=0) / (high - low).clamp(min=1e-9), own)

    def save(self, path: Path) -> None:
        """Write safetensors: shifts in float32, moments in float64, the rest as JSON in the metadata."""
        tensors = {
            "mean": self.mean,
            "second": self.second,
            "base.mean": self.base.mean,
            "base.second": self.base.second,
            "reference.mean": self.reference.mean,
            "reference.second": self.reference.second,
        }
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("mean", "second", "base", "reference", "cost", "projection", "bases")
            and (name != "ages" or self.ages)
        }
        plain |= {"cost": self.cost.describe(), "nums": [self.base.num, self.reference.num]}
        metadata = {"format": FORMAT, "version": str(VERSION), "table": json.dumps(plain)}
        if self.projection is not None:
            tensors["projection"] = self.projection
        if self.bases:  # apart from "table", so that readers that do not know them pass over them
            metadata["bases"] = json.dumps([[*key, of.num] for key, of in self.bases.items()])
            for (solver, steps), of in self.bases.items():
                tensors |= {f"base.{solver}.{steps}.mean": of.mean, f"base.{solver}.{steps}.second": of.second}
        shifts = {name: tensors[name].float().contiguous() for name in ("mean", "second")}
        moments = {name: t.double().contiguous() for name, t in tensors.items() if name not in shifts}
        save_file(shifts | moments, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table.

        Raises:
            CheckpointError: missing, damaged, or no shift table of this version.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                    raise CheckpointError(f"{path}: expected a {FORMAT} file of version {VERSION}")
                t = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
            plain = json.loads(metadata["table"])
            nums, cost = plain.pop("nums"), CostModel.from_description(plain.pop("cost"))
            plain |= {"pairs": tuple(map(tuple, plain["pairs"])), "edges": tuple(plain["edges"])}
            plain["ages"] = tuple(plain.get("ages", ()))
            base = Moments(t["base.mean"], t["base.second"], nums[0])
            reference = Moments(t["reference.mean"], t["reference.second"], nums[1])
            bases = {
                (solver, steps): Moments(t[f"base.{solver}.{steps}.mean"], t[f"base.{solver}.{steps}.second"], num)
                for solver, steps, num in json.loads(metadata.get("bases", "[]"))
            }
            shifts = {"mean": t["mean"], "second": t["second"], "projection": t.get("projection")}
            return cls(base=base, reference=reference, cost=cost, bases=bases, **shifts, **plain)
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: no readable shift table ({error})") from error

    def router(self, budget: float) -> Router:
        """What searches a plan on this table for any steps, under `budget`: `plan=table.router(0.6)`.

        The table's times are those of the machine it was measured on; `plan_on_table` measures them anew elsewhere.
        """
        return lambda full, _depths: search(self, full, budget)

    def save_pretrained(self, save_directory: str | Path, **ignored: object) -> None:
        """Write the folder of a pipeline's component: the table, under its usual name."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **ignored: object) -> Self:
        """Read the table in a folder: a pipeline's component, or a model's.

        Raises:
            CheckpointError: missing, damaged, or no shift table of this version.
        """
        return cls.load(Path(folder) / FILE)


class Predictor:
    """The prediction of a table at given timesteps: plan -> Fréchet distance to the reference."""

    def __init__(self, table: ShiftTable, timesteps: Sequence[int], base: Moments | None = None) -> None:
        """`base`: moments of full depth at these very steps, where they were measured (else the table's)."""
        self.table = table
        self.base = table.base if base is None else base
        self.unbias = self.base.num / (self.base.num - 1)
        self.pairs: tuple[Pair, ...] = (*dict.fromkeys(table.pairs), table.full_pair)
        self.index = {pair: i for i, pair in enumerate(self.pairs)}
        self.entries = AgedEntries(table, self.pairs, self.nearest, len(timesteps)) if table.ages else None
        self.weights = table.weights(timesteps)
        bands, features = table.num_bands, table.mean.shape[-1]
        zero = table.mean.new_zeros
        self.mean = torch.cat([table.mean, zero(bands, 1, features)], dim=1)
        self.second = torch.cat([table.second, zero(bands, 1, features, features)], dim=1)
        self.frechet = FrechetTo(table.reference)
        self.seconds = torch.tensor([table.cost.step_seconds(*p) for p in self.pairs], dtype=torch.float64)

    def coverage(self, choices: Tensor) -> Tensor:
        """A of the module's docstring.  choices: (M, K) indices into `pairs` -> (M, bands, P + 1) of the table's."""
        taken = choices if self.entries is None else self.entries.taken(choices)[1]
        chosen = torch.nn.functional.one_hot(taken, self.mean.shape[1]).double()
        return torch.einsum("kb,mkp->mbp", self.weights, chosen)

    def moments(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """choices: (M, K) -> predicted means (M, F) and covariances (M, F, F)."""
        return self.moments_at(self.coverage(choices))

    def moments_at(self, coverage: Tensor) -> tuple[Tensor, Tensor]:
        """coverage: (M, bands, P + 1), whole steps or shares of them -> means (M, F) and covariances (M, F, F)."""
        a = coverage.flatten(1)
        mean = self.base.mean + a @ self.mean.flatten(0, 1)
        second = self.base.second + (a @ self.second.flatten(0, 1).flatten(1)).view(-1, *self.second.shape[2:])
        return mean, self.unbias * (second - mean[:, :, None] * mean[:, None, :])

    def base_through(self, plan: DepthPlan, measured: Moments) -> Moments:
        """What full depth's moments would have to be for the prediction of this plan to be what was measured of it."""
        coverage = self.coverage(self.choice(plan)[None])
        a = coverage.flatten(1)
        mean = measured.mean - (a @ self.mean.flatten(0, 1))[0]
        second = measured.second - (a @ self.second.flatten(0, 1).flatten(1)).view_as(measured.second)
        return Moments(mean, second, measured.num)

    def distances(self, choices: Tensor) -> Tensor:
        """choices: (M, K) -> predicted Fréchet distances (M,)."""
        return self.frechet(*self.moments(choices))

    def slopes(self, choice: Tensor) -> Tensor:
        """First-order change of the distance per step and pair around a plan.  choice: (K,) -> (K, P + 1)."""
        by_entry = self.entry_slopes(choice)
        return by_entry if self.entries is None else by_entry.gather(1, self.entries.at(choice))

    def entry_slopes(self, choice: Tensor) -> Tensor:
        """The same per entry of the table, and for full depth.  choice: (K,) -> (K, entries + 1)."""
        mean, covariance = (m[0] for m in self.moments(choice[None]))
        d_mean, d_covariance = self.frechet.gradient(mean, covariance)
        d_covariance = self.unbias * d_covariance
        d_mean = d_mean - 2 * d_covariance @ mean
        per_band = self.mean @ d_mean + (self.second * d_covariance).sum(dim=(2, 3))
        return self.weights @ per_band

    def choice(self, plan: DepthPlan) -> Tensor:
        """(K,) indices of the plan's pairs; a pair the table lacks is replaced by the nearest measured one."""
        return torch.tensor([self.nearest(pair) for pair in plan.pairs])

    def nearest(self, pair: Pair) -> int:
        """Index of the measured pair with the closest depths."""
        if pair in self.index:
            return self.index[pair]
        (cond, uncond), kind = pair, _guidance(pair[1])
        gaps = [
            abs(abs(c) - abs(cond)) + abs(u - uncond) + 100 * abs(_guidance(u) - kind) + 1000 * ((c < 0) != (cond < 0))
            for c, u in self.pairs
        ]
        return int(np.argmin(gaps))

    def settled(self, choices: Tensor) -> Tensor:
        """The choices (M, K) without forecasts from nothing, or from longer ago than was measured: plain exits."""
        return choices if self.entries is None else self.entries.taken(choices)[0]

    def predict(self, plan: DepthPlan) -> float:
        """Predicted Fréchet distance of a plan."""
        return self.distances(self.choice(plan)[None]).item()


def _guidance(uncond: int) -> int:
    """What an unconditional depth says: 1 a pass, 0 none, below that reused guidance and a guide of its own."""
    return max(min(uncond, 1), own_exit(1))


@dataclass(frozen=True)
class SearchSettings:
    """How hard to search: starts, kicks (restarts from the best plan, a third of it made random), exact evaluations
    per move, and the most units moved apart.

    Steps beyond `max_units` are moved in groups of neighbours, which keeps 250 steps as quick as 25.
    """

    num_starts: int = 6
    num_kicks: int = 4
    evaluations: int = 48
    max_units: int = 25
    max_moves: int = 400


def search(
    table: ShiftTable,
    full: DepthPlan,
    budget: float,
    *,
    base: Moments | None = None,
    settings: SearchSettings | None = None,
    starts: Sequence[DepthPlan] = (),
) -> DepthPlan:
    """The plan of least predicted Fréchet distance within `budget`, a share of the full plan's predicted time.

    base: moments of full depth at these very steps; by default those that the table holds, else its own steps'.
    starts: plans of the same steps to start from besides, where they are within the budget.

    A local search from ramps, constants of every pair and the cheapest plan: every move changes one or two steps; moves
    are ranked by their first-order effect, the best are evaluated exactly, the best of those is taken.

    Raises:
        InputError: the budget is outside (0, 1], or below the cheapest plan.
    """
    if not 0 < budget <= 1:
        raise InputError(f"--budget {budget:g}: expected above 0 and at most 1")
    settings = settings or SearchSettings()
    base = table.base_at(full.solver, full.num_steps) if base is None else base
    predictor = Predictor(table, full.timesteps, base)
    limit = budget * predictor.seconds[-1].item() * full.num_steps * (1 + 1e-9)
    if budget < table.least_share * (1 - 1e-9):
        raise InputError(f"--budget {budget:g}: the cheapest plan of this model needs {table.least_share:.2f}")
    best, best_value = None, float("inf")
    given = [predictor.choice(plan) for plan in starts]
    given = [choice for choice in given if predictor.seconds[choice].sum() <= limit]
    for choice in given + _starts(predictor, full, limit, settings.num_starts):
        choice, value = _improve(predictor, choice, limit, settings)
        if value < best_value:
            best, best_value = choice, value
    kicks = torch.Generator().manual_seed(0)
    for _ in range(settings.num_kicks):
        choice, value = _improve(predictor, _kicked(predictor, best, limit, kicks), limit, settings)
        if value < best_value:
            best, best_value = choice, value
    plan = full.with_pairs(
        [predictor.pairs[i] for i in best.tolist()],
        router="searched",
        budget=budget,
        trunk=table.trunk,
        exits=table.exits,
    )
    figures = {
        "predicted_fd": best_value,
        "predicted_fd_full": predictor.predict(full),
        "predicted_share_of_time": table.cost.share_of_time(plan),
        "share_of_blocks": plan.share_of_blocks,
    }
    return replace(plan, figures=figures)


def _starts(predictor: Predictor, full: DepthPlan, limit: float, num: int) -> list[Tensor]:
    """Ramps, and constants of every pair, within the budget, best predicted first, and the cheapest plan."""
    depths = tuple(sorted({c for c, _ in predictor.pairs if c > 0}))
    plans = [full.with_pairs([pair] * full.num_steps) for pair in predictor.pairs if pair[0] > 0] + [
        ramp(full, depths, low, high, power)
        for low in depths
        for high in depths
        for power in (0.5, 1.0, 2.0)
        if low < high
    ]
    choices = torch.stack([predictor.choice(plan) for plan in plans] + _periodic(predictor, full.num_steps))
    choices = choices[predictor.seconds[choices].sum(1) <= limit]
    cheapest = torch.full((full.num_steps,), int(predictor.seconds.argmin()))
    if not len(choices):
        return [cheapest]
    order = predictor.distances(choices).argsort()[:num]
    return [*choices[order], cheapest]


def _periodic(predictor: Predictor, num_steps: int) -> list[Tensor]:
    """Full depth every other step, or every third, ..., as long as ages were measured; each forecast between."""
    if predictor.entries is None:
        return []
    full, plans = len(predictor.pairs) - 1, []
    for pair in (i for i, (cond, _) in enumerate(predictor.pairs) if cond < 0):
        for period in range(2, predictor.entries.oldest + 2):
            steps = torch.arange(num_steps)
            plans.append(predictor.settled(torch.where(steps % period == 0, full, pair)[None])[0])
    return plans


def _kicked(predictor: Predictor, choice: Tensor, limit: float, generator: torch.Generator) -> Tensor:
    """A third of the steps moved to random pairs, then random steps made cheapest until the budget holds."""
    before, choice, steps = choice, choice.clone(), len(choice)
    order = torch.randperm(steps, generator=generator)
    moved = order[: max(1, steps // 3)]
    choice[moved] = torch.randint(len(predictor.pairs), (len(moved),), generator=generator)
    for step in order.flip(0).tolist():
        if predictor.seconds[choice].sum() <= limit:
            break
        choice[step] = predictor.seconds.argmin()
    settled = predictor.settled(choice[None])[0]
    return settled if predictor.seconds[settled].sum() <= limit else before


def _improve(predictor: Predictor, choice: Tensor, limit: float, settings: SearchSettings) -> tuple[Tensor, float]:
    """Local search from one plan.  choice: (K,) -> (K,), its predicted distance."""
    num_steps, num_pairs = len(choice), len(predictor.pairs)
    units = np.array_split(np.arange(num_steps), min(num_steps, settings.max_units))
    member = torch.zeros(len(units), num_steps, dtype=torch.float64)
    for i, unit in enumerate(units):
        member[i, unit] = 1
    value = predictor.distances(choice[None]).item()
    for _ in range(settings.max_moves):
        slopes = predictor.slopes(choice)
        gain = member @ (slopes - slopes.gather(1, choice[:, None]))  # (U, P): first-order change
        cost = member @ (predictor.seconds[None, :] - predictor.seconds[choice][:, None])
        spare = limit - predictor.seconds[choice].sum().item()
        moves = _ranked_moves(gain.flatten(), cost.flatten(), spare, num_pairs, settings.evaluations)
        candidates = choice.repeat(len(moves), 1)
        for row, move in enumerate(moves):
            for flat in move:
                candidates[row, units[flat // num_pairs]] = flat % num_pairs
        if predictor.entries is not None:  # where a step leaves full depth, forecasts after it may be left with nothing
            candidates = torch.cat([predictor.settled(candidates), *_programmed(predictor, choice, limit)])
            candidates = candidates[predictor.seconds[candidates].sum(1) <= limit]
        if not len(candidates):
            break
        values = predictor.distances(candidates)
        best = int(values.argmin())
        if values[best].item() >= value - 1e-9:
            break
        choice, value = candidates[best], values[best].item()
    return choice, value


def _programmed(predictor: Predictor, choice: Tensor, limit: float) -> list[Tensor]:
    """Plans that the dynamic program finds around one, within the budget.  choice: (K,) -> (1, K) each.

    First-order changes hold near the plan they are taken at, so leaving its pairs costs a share of what the changes
    themselves are worth; the price of a second is found by bisection.
    """
    values, plans = predictor.entry_slopes(choice), []
    stay = predictor.entries.taken(choice[None])[1][0]
    gained = values - values.gather(1, stay[:, None])
    scale = gained.abs().median().item()
    for reluctance in (0.0, 0.3, 1.0, 3.0):
        costly = gained + reluctance * scale
        costly[torch.arange(len(stay)), stay] = 0.0
        low, high = 0.0, 1e3 * scale / predictor.seconds.min().item()
        for _ in range(30):
            price = (low + high) / 2
            found = predictor.entries.programmed(costly, predictor.seconds, price)
            if predictor.seconds[found].sum() <= limit:
                high, kept = price, found
                plans.append(kept[None])
            else:
                low = price
    return list({tuple(plan[0].tolist()): plan for plan in plans}.values())


def _ranked_moves(gain: Tensor, cost: Tensor, spare: float, num_pairs: int, num: int) -> list[tuple[int, ...]]:
    """The most promising single and double moves within the spare time, by first-order change.

    gain, cost: (U * P,), a move being unit * P + pair. Of a small table (up to 64 moves) all are returned.
    """
    singles = torch.nonzero(cost <= spare).flatten()
    moves = [(gain[i].item(), (int(i),)) for i in singles[gain[singles].argsort()[:num]]]
    # Doubles: the best bought, with the best bought or the cheapest sold.
    keep = min(len(gain), 128)
    buy = gain.argsort()[:keep]
    sell = (gain / cost.abs().clamp(min=1e-12)).masked_fill(cost >= 0, torch.inf).argsort()[:keep]
    other = torch.cat([buy, sell]).unique()
    fits = cost[buy][:, None] + cost[other][None, :] <= spare
    apart = (buy // num_pairs)[:, None] != (other // num_pairs)[None, :]
    total = (gain[buy][:, None] + gain[other][None, :]).masked_fill(~(fits & apart), torch.inf).flatten()
    for flat in total.argsort()[: num if len(gain) > 64 else None].tolist():
        if total[flat] == torch.inf:
            break
        pair = sorted((int(buy[flat // len(other)]), int(other[flat % len(other)])))
        moves.append((total[flat].item(), tuple(pair)))
    moves.sort(key=lambda move: move[0])
    if len(gain) > 64:
        # Singles must not be crowded out by doubles whose first-order sum looks better.
        moves = moves[:num] + [move for move in moves[num:] if len(move[1]) == 1][: num // 2]
    return list(dict.fromkeys(move for _, move in moves))
