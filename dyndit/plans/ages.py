"""How old a forecast is, and so which entry of a shift table it takes: the age follows from the steps before it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dyndit.plans.table import Pair, ShiftTable


class AgedEntries:
    """Which entry of a table a step takes: of a pair that forecasts, that of the age which the steps before it make."""

    def __init__(
        self, table: "ShiftTable", pairs: "tuple[Pair, ...]", nearest: "Callable[[Pair], int]", num_steps: int
    ) -> None:
        """nearest: of a pair that does not forecast, its index in `pairs` or the closest one's."""
        self.oldest, self.full = max(table.ages), torch.tensor([cond == table.num_blocks for cond, _ in pairs])
        # Ages are steps of the table; between two steps of a longer sampling less changes.
        self.pace = table.num_steps / num_steps
        where = {(pair, age): i for i, (pair, age) in enumerate(zip(table.pairs, table.ages, strict=True))}
        where[table.full_pair, 0] = len(table.pairs)
        plain = [i if cond > 0 else nearest((-cond, uncond)) for i, (cond, uncond) in enumerate(pairs)]
        self.plain = torch.tensor(plain)
        """Of each pair, itself or, where it forecasts, the plain exit that it stands for without."""
        alone = [where[pairs[i], 0] for i in plain]
        ages = range(self.oldest + 1)  # the first column: no age, so no forecast
        self.entry = torch.tensor([[where.get((pair, age), alone[i]) for age in ages] for i, pair in enumerate(pairs)])
        self.known = torch.tensor([[(pair, age) in where or pair[0] > 0 for age in ages] for pair in pairs])

    def _columns(self, since: Tensor) -> Tensor:
        """Column of `entry` where full depth was `since` steps ago (0: never)."""
        column = (since * self.pace - 1e-9).ceil().long()
        return torch.where(column > self.oldest, 0, column)

    def taken(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """choices: (M, K) of pairs -> the same without forecasts that nothing allows, and the entries they take."""
        since, settled, entries = torch.zeros(len(choices), dtype=torch.long), [], []
        for choice in choices.unbind(1):
            column = self._columns(since)
            choice = torch.where(self.known[choice, column], choice, self.plain[choice])
            settled.append(choice)
            entries.append(self.entry[choice, column])
            since = torch.where(self.full[choice], 1, torch.where(since > 0, since + 1, 0))
        return torch.stack(settled, 1), torch.stack(entries, 1)

    def at(self, choice: Tensor) -> Tensor:
        """The entry that each pair would take at every step of a plan.  choice: (K,) -> (K, P)."""
        return self.entry[:, self._columns(self._since(choice))].T

    def _since(self, choice: Tensor) -> Tensor:
        """How many steps ago full depth was, at every step; 0: never.  choice: (K,) -> (K,)."""
        since, now = [], 0
        for full in self.full[choice].tolist():
            since.append(now)
            now = 1 if full else now + 1 if now else 0
        return torch.tensor(since)

    def programmed(self, values: Tensor, costs: Tensor, price: float) -> Tensor:
        """The plan of least sum of values and prices, by a dynamic program over the steps since full depth.

        values: (K, entries), what each entry adds at each step; costs: (P,), seconds; price: of a second. -> (K,).
        """
        num_steps, most = len(values), len(values) + 1
        columns = self._columns(torch.arange(most))
        later, best = torch.zeros(most, dtype=torch.float64), []
        for step in reversed(range(num_steps)):
            # (P, states): what a pair adds in each state, and what follows from the state after it.
            state = torch.arange(most)
            after = torch.where(self.full[:, None], 1, torch.where(state > 0, (state + 1).clamp(max=most - 1), 0))
            total = values[step][self.entry[:, columns]] + price * costs[:, None] + later[after]
            total = total.masked_fill(~self.known[:, columns], torch.inf)
            later, choice = total.min(0)
            best.append(choice)
        now, plan = 0, []
        for choice in reversed(best):
            pair = int(choice[now])
            plan.append(pair)
            now = 1 if self.full[pair] else now + 1 if now else 0
        return torch.tensor(plan)
