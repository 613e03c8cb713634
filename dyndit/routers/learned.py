"""The learned router: one small network that writes plans for every budget and any timesteps.

For each step it maps (lambda, the step's size in lambda, budget), lambda being the log-SNR, to scores over the pairs
of a shift table. It is trained on that table alone, no pictures are drawn: choices pi[k, p] cover band b by
A[b, p] = sum_k w[k, b] pi[k, p], the predicted moments are polynomials in A (see `searched`), and the logarithm of
their distance is a loss with a gradient in pi. Time is penalised as a plan's time will be: every pair's score is
lowered by a price times its seconds, the lowest price at which the plan fits the budget. The pairs are drawn by
Gumbel-softmax, straight-through: pi is the drawn plan, its gradient that of softmax((scores - price * seconds +
noise) / T) (Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712). A soft plan in its place would
promise mixtures of depths that no plan can run. T falls while budgets, step counts and spacings are drawn at random.

A plan is the best pair at every step, at the price that its budget demands (`within`). It has one depth for all
classes, as the table has: the class is no input. An option: searched plans are the default until it beats them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dyndit.cost import CostModel
from dyndit.errors import CheckpointError, InputError
from dyndit.formats.files import read_safetensors, write_safetensors
from dyndit.objectives import Schedule
from dyndit.plan import DepthPlan, Router
from dyndit.routers.searched import Pair, Predictor, ShiftTable

FORMAT = "dyndit-learned-router"
VERSION = 1
SCHEDULE = Schedule()
NUM_WAVES = 4  # sines and cosines over the range of lambda
MAX_SCORE = 5.0  # scores further apart than the noise of the draw would end the exploration


@dataclass(frozen=True)
class LearnedSettings:
    """How the network is trained.

    batch_size: samplings (timesteps and a budget each) an iteration. temperatures: first and last. num_steps: least and
    most steps of a sampling.
    """

    width: int = 48
    iterations: int = 400
    batch_size: int = 16
    learning_rate: float = 5e-3
    temperatures: tuple[float, float] = (1.0, 0.3)
    num_steps: tuple[int, int] = (5, 25)
    seed: int = 0


def features(timesteps: Sequence[float], budget: float) -> Tensor:
    """What the network sees of every step of a sampling.  -> (K, 3 + 2 NUM_WAVES), float64."""
    at = torch.tensor([SCHEDULE.log_snr_at(t) for t in (*timesteps, 0)], dtype=torch.float64)
    low, high = SCHEDULE.log_snr_at(SCHEDULE.num_timesteps - 1), SCHEDULE.log_snr_at(0)
    place, size = (at[:-1] - low) / (high - low), (at[1:] - at[:-1]) / (high - low)
    angles = torch.pi * place[:, None] * torch.arange(1, NUM_WAVES + 1)
    plain = torch.stack([place, (size + 1e-3).log() / 4, torch.full_like(place, budget)], dim=1)
    return torch.cat([plain, angles.sin(), angles.cos()], dim=1)


class LearnedRouter(nn.Module):
    """Scores over a table's pairs by step, and the plans they make. `router.router(0.6)` is what `plan=` takes."""

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        cost: CostModel,
        cfg_scale: float,
        *,
        width: int = 48,
        trunk: str = "",
        exits: str = "",
    ) -> None:
        """pairs: P + 1, the last one the full one. cost: whose times budgets are shares of."""
        super().__init__()
        self.pairs, self.cost, self.cfg_scale, self.width = pairs, cost, cfg_scale, width
        self.trunk, self.exits = trunk, exits
        self.seconds = torch.tensor([cost.step_seconds(*pair) for pair in pairs], dtype=torch.float64)
        self.layers = nn.Sequential(
            nn.Linear(3 + 2 * NUM_WAVES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, len(pairs)),
        ).double()  # fmt: skip

    def forward(self, seen: Tensor) -> Tensor:
        """seen: (K, ...) of `features` -> scores (K, P + 1)."""
        return MAX_SCORE * (self.layers(seen) / MAX_SCORE).tanh()

    @torch.no_grad()
    def plan(self, full: DepthPlan, budget: float) -> DepthPlan:
        """A plan within `budget`, a share of the full plan's predicted time.

        Raises:
            InputError: the budget is outside (0, 1] or below the cheapest plan, or the router was trained for a model
                of another depth, or for another guidance scale.
        """
        expected = (self.cost.num_blocks, self.cfg_scale)
        if (full.num_blocks, full.cfg_scale) != expected:
            raise InputError(
                f"learned router: of {expected[0]} blocks and guidance scale {expected[1]:g}, asked for a plan of "
                f"{full.num_blocks} and {full.cfg_scale:g}"
            )
        least = (self.seconds.min() / self.seconds[-1]).item()
        _check_budget(budget, least)
        limit = max(budget, least) * self.seconds[-1].item() * full.num_steps * (1 + 1e-9)
        choice = within(self(features(full.timesteps, budget)), self.seconds, limit)
        plan = full.with_pairs(
            [self.pairs[i] for i in choice.tolist()],
            router="learned",
            budget=budget,
            trunk=self.trunk,
            exits=self.exits,
        )
        figures = {
            "predicted_share_of_time": self.cost.share_of_time(plan),
            "share_of_blocks": plan.share_of_blocks,
        }
        return replace(plan, figures=figures)

    def router(self, budget: float) -> Router:
        """What writes a plan for any steps under `budget`: `plan=learned.router(0.6)`."""
        return lambda full, _depths: self.plan(full, budget)

    def save(self, path: Path) -> None:
        """Write safetensors: the weights, and the rest as JSON in the metadata."""
        plain = {
            "pairs": self.pairs,
            "cost": self.cost.describe(),
            "cfg_scale": self.cfg_scale,
            "width": self.width,
            "trunk": self.trunk,
            "exits": self.exits,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "router": json.dumps(plain)}
        write_safetensors(self.state_dict(), Path(path), metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a router.

        Raises:
            CheckpointError: missing, damaged, or no learned router of this version.
        """
        tensors, metadata = read_safetensors(Path(path))
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
            raise CheckpointError(f"{path}: expected a {FORMAT} file of version {VERSION}")
        try:
            plain = json.loads(metadata["router"])
            pairs, cost = tuple(map(tuple, plain.pop("pairs"))), CostModel.from_description(plain.pop("cost"))
            router = cls(pairs, cost, plain.pop("cfg_scale"), **plain)
            router.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: no readable learned router ({error})") from error
        return router.eval()


def _check_budget(budget: float, least: float) -> None:
    if not 0 < budget <= 1:
        raise InputError(f"--budget {budget:g}: expected above 0 and at most 1")
    if budget < least * (1 - 1e-9):
        raise InputError(f"--budget {budget:g}: the cheapest plan of this model needs {least:.2f}")


def price_of_time(scores: Tensor, seconds: Tensor, limit: float) -> float:
    """The lowest price of a second at which the pairs of highest score less price take no more than `limit` together.

    scores: (K, P + 1), seconds: (P + 1,), K times the least of them within the limit. Those pairs have the highest sum
    of scores of all that take no longer than they do (Everett 1963, "Generalized Lagrange Multiplier Method for Solving
    Problems of Optimum Allocation of Resources").
    """

    def fits(price: float) -> bool:
        return seconds[(scores - price * seconds).argmax(1)].sum().item() <= limit

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1 / seconds.max().item()
    while not fits(high):
        low, high = high, 4 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def within(scores: Tensor, seconds: Tensor, limit: float) -> Tensor:
    """Pairs of high scores that take at most `limit` seconds together: those at the price of time, then what fits yet.

    scores: (K, P + 1), seconds: (P + 1,), K times the least of them within the limit -> (K,) indices. The time that the
    price leaves over goes to the changes of one step that gain most for it.
    """
    choice = (scores - price_of_time(scores, seconds, limit) * seconds).argmax(1)
    while True:
        gain = scores - scores.gather(1, choice[:, None])
        cost = seconds[None] - seconds[choice][:, None]
        fits = (gain > 0) & (cost <= limit - seconds[choice].sum())
        if not fits.any():
            return choice
        best = int((gain / cost.clamp(min=1e-12)).masked_fill(~fits, -torch.inf).argmax())
        choice[best // len(seconds)] = best % len(seconds)


def train_router(table: ShiftTable, settings: LearnedSettings | None = None) -> LearnedRouter:
    """Train a router on a table: some seconds to a minute on a CPU. The same table and settings give the same router.

    Raises:
        InputError: a setting is out of range, or the table measures forecasts, which depend on the steps before.
    """
    settings = settings or LearnedSettings()
    if not 1 <= settings.num_steps[0] <= settings.num_steps[1] or min(settings.temperatures) <= 0:
        raise InputError(
            f"learned router: {settings.num_steps} steps at temperatures {settings.temperatures}; expected "
            "1 <= least <= most, and temperatures above 0"
        )
    if table.ages:
        raise InputError("learned router: its table measures forecasts; expected one without")
    predictor, least = Predictor(table, table.edges[:-1]), table.least_share
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        pairs = (*table.pairs, table.full_pair)
        hashes = {"trunk": table.trunk, "exits": table.exits}
        router = LearnedRouter(pairs, table.cost, table.cfg_scale, width=settings.width, **hashes)
    optimiser = torch.optim.Adam(router.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.iterations)
    drawn, (first, last) = torch.Generator().manual_seed(settings.seed), settings.temperatures
    for iteration in range(settings.iterations):
        temperature = first * (last / first) ** (iteration / settings.iterations)
        samplings = [_timesteps(table, settings, drawn) for _ in range(settings.batch_size)]
        budgets = (least + (1 - least) * torch.rand(len(samplings), generator=drawn, dtype=torch.float64)).tolist()
        loss = _loss(router, predictor, samplings, budgets, temperature, drawn)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return router.eval()


def _loss(
    router: LearnedRouter,
    predictor: Predictor,
    samplings: list[tuple[float, ...]],
    budgets: list[float],
    temperature: float,
    drawn: torch.Generator,
) -> Tensor:
    """What has the gradient of the mean over samplings of log FD."""
    seen = torch.cat([features(timesteps, budget) for timesteps, budget in zip(samplings, budgets, strict=True)])
    scores = router(seen).split([len(timesteps) for timesteps in samplings])
    coverage = []
    for timesteps, mine, budget in zip(samplings, scores, budgets, strict=True):
        pi = _drawn_pairs(mine, router.seconds / router.seconds[-1], budget, temperature, drawn)
        coverage.append(predictor.table.weights(timesteps).T @ pi)
    mean, covariance = predictor.moments_at(torch.stack(coverage))
    with torch.no_grad():
        distance = predictor.frechet(mean, covariance).clamp(min=1e-3)
        d_mean, d_covariance = predictor.frechet.gradient(mean, covariance)
    # Its gradient is that of the distance: autograd cannot pass a vanishing eigenvalue's square root.
    linear = (d_mean * mean).sum(1) + (d_covariance * covariance).sum((1, 2))
    return (linear / distance).mean()


def _drawn_pairs(scores: Tensor, seconds: Tensor, budget: float, temperature: float, drawn: torch.Generator) -> Tensor:
    """One pair a step within the budget, one-hot, with the gradient of the softmax it was drawn by.

    scores: (K, P + 1), seconds: (P + 1,) over those of the full pair -> (K, P + 1).
    """
    noisy = scores - torch.empty_like(scores).exponential_(generator=drawn).log()  # Gumbel noise
    price = price_of_time(noisy.detach(), seconds, budget * len(scores) * (1 + 1e-9))
    soft = ((noisy - price * seconds) / temperature).softmax(1)
    return nn.functional.one_hot(soft.argmax(1), scores.shape[1]) + soft - soft.detach()


def _timesteps(table: ShiftTable, settings: LearnedSettings, drawn: torch.Generator) -> tuple[float, ...]:
    """Timesteps of a sampling: the table's own half of the time, else of any count, spaced evenly up to a power."""
    own, count, power = torch.rand(3, generator=drawn).tolist()
    if own < 0.5:
        return table.edges[:-1]
    least, most = settings.num_steps
    num = least + int(count * (most - least + 1))
    return tuple(table.edges[0] * (1 - k / num) ** (0.75 + 0.75 * power) for k in range(num))
