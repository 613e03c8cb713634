"""Ages of forecasts: the number of steps since the last full-depth step. The age decides a step's table entry."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dyndit.plans.step import Step
from dyndit.plans.table import ShiftTable


class AgedEntries:
    """Choose the table entry of each step. A choice that forecasts has one entry per age.

    The age follows from the steps before it, so a plan is read from its first step to its last.
    """

    def __init__(
        self, table: ShiftTable, choices: tuple[Step, ...], nearest: Callable[[Step], int], num_steps: int
    ) -> None:
        """Read the table.  nearest: maps a step without a forecast to the index of its closest entry in `choices`."""
        self.oldest, self.full = max(table.ages), torch.tensor([c.depth == table.num_blocks for c in choices])
        # Ages count steps of the table. A longer sampling changes less between two steps.
        self.pace = table.num_steps / num_steps
        where = {(choice, age): i for i, (choice, age) in enumerate(zip(table.choices, table.ages, strict=True))}
        where[table.full_step, 0] = len(table.choices)
        plain = [nearest(replace(c, forecast=False)) if c.forecast else i for i, c in enumerate(choices)]
        self.plain = torch.tensor(plain)
        """`plain[i]`: the index of choice i without its forecast."""
        alone = [where[choices[i], 0] for i in plain]
        ages = range(self.oldest + 1)  # the first column has no age, so no forecast
        self.entry = torch.tensor([[where.get((c, age), alone[i]) for age in ages] for i, c in enumerate(choices)])
        self.known = torch.tensor([[(c, age) in where or not c.forecast for age in ages] for c in choices])

    def _columns(self, since: Tensor) -> Tensor:
        """Return the column of `entry` for full depth `since` steps ago (0: never)."""
        column = (since * self.pace - 1e-9).ceil().long()
        return torch.where(column > self.oldest, 0, column)

    def taken(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Replace forecasts that have no measured age by plain exits.

        choices: (M, K) indices -> the settled indices (M, K), and their table entries (M, K).
        """
        since, settled, entries = torch.zeros(len(choices), dtype=torch.long), [], []
        for choice in choices.unbind(1):
            column = self._columns(since)
            choice = torch.where(self.known[choice, column], choice, self.plain[choice])
            settled.append(choice)
            entries.append(self.entry[choice, column])
            since = torch.where(self.full[choice], 1, torch.where(since > 0, since + 1, 0))
        return torch.stack(settled, 1), torch.stack(entries, 1)

    def at(self, choice: Tensor) -> Tensor:
        """Return the entry that each choice would take at every step of a plan.  choice: (K,) -> (K, P)."""
        return self.entry[:, self._columns(self._since(choice))].T

    def _since(self, choice: Tensor) -> Tensor:
        """Count the steps since full depth at every step; 0: never.  choice: (K,) -> (K,)."""
        since, now = [], 0
        for full in self.full[choice].tolist():
            since.append(now)
            now = 1 if full else now + 1 if now else 0
        return torch.tensor(since)

    def programmed(self, values: Tensor, costs: Tensor, price: float) -> Tensor:
        """Find the plan of least values plus prices by a dynamic program over the steps since full depth.

        values: (K, entries), the value of each entry at each step; costs: (P,), seconds; price: per second. -> (K,).
        """
        num_steps, most = len(values), len(values) + 1
        columns = self._columns(torch.arange(most))
        later, best = torch.zeros(most, dtype=torch.float64), []
        for step in reversed(range(num_steps)):
            # total: (P, states), the value of a choice in each state plus the best value of the later steps.
            state = torch.arange(most)
            after = torch.where(self.full[:, None], 1, torch.where(state > 0, (state + 1).clamp(max=most - 1), 0))
            total = values[step][self.entry[:, columns]] + price * costs[:, None] + later[after]
            total = total.masked_fill(~self.known[:, columns], torch.inf)
            later, choice = total.min(0)
            best.append(choice)
        now, plan = 0, []
        for choice in reversed(best):
            picked = int(choice[now])
            plan.append(picked)
            now = 1 if self.full[picked] else now + 1 if now else 0
        return torch.tensor(plan)
