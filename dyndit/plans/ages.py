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
            since = _later(since, self.full[choice])
        return torch.stack(settled, 1), torch.stack(entries, 1)

    def at(self, choice: Tensor) -> Tensor:
        """Return the entry that each choice would take at every step of a plan.  choice: (K,) -> (K, P)."""
        steps = torch.arange(len(choice))
        latest = torch.where(self.full[choice], steps, -1).cummax(0).values.roll(1)  # the last full step before each
        latest[0] = -1
        return self.entry[:, self._columns(torch.where(latest < 0, 0, steps - latest))].T

    def programmed(self, values: Tensor, costs: Tensor, price: float) -> Tensor:
        """Find the plan of least values plus prices by a dynamic program over the steps since full depth.

        values: (K, entries), the value of each entry at each step; costs: (P,), seconds; price: per second. -> (K,).
        """
        most = len(values)
        states = torch.arange(most + 1)
        columns, after = self._columns(states), _later(states, self.full[:, None]).clamp(max=most)
        later, best = torch.zeros(most + 1, dtype=torch.float64), []
        for value in values.flip(0):
            # total: (P, states), the value of a choice in each state plus the best value of the later steps.
            total = value[self.entry[:, columns]] + price * costs[:, None] + later[after]
            later, choice = total.masked_fill(~self.known[:, columns], torch.inf).min(0)
            best.append(choice)
        now, plan = 0, []
        for choice in reversed(best):
            plan.append(int(choice[now]))
            now = after[plan[-1], now]
        return torch.tensor(plan)


def _later(since: Tensor, full: Tensor) -> Tensor:
    """Count the steps since full depth at the next step; 0: never.  full: tells if this step is at full depth."""
    return torch.where(full, 1, torch.where(since > 0, since + 1, 0))
