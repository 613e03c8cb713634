"""The work of one sampling step: samplers, costs and the plug-in all read this description."""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Work:
    """The branches and heads of one step.

    Example: `Work((12, 6))` runs 12 blocks with the condition and 6 without it; `Work((8,), own_exit=4)` runs 8 blocks
    and, on the way, the exit head after block 4.
    """

    depths: tuple[int, ...]
    """Blocks that each branch runs: the conditional branch first, then the unconditional branch if it runs."""
    own_exit: int = 0
    """Depth of the conditional branch's exit that guides it; 0: no exit guides it."""
    held: bool = False
    """Guide by the difference between both branches at the last step that ran both branches."""
    forecast: bool = False
    """Add a forecast of the gap to full depth to the conditional exit's prediction."""
    kept: tuple[int, ...] = ()
    """Exits whose gap to full depth is remembered for later forecasts, rising. Their heads run at this step."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks run, summed over all branches."""
        return sum(self.depths)

    @property
    def heads_on_the_way(self) -> tuple[int, ...]:
        """Return the exit heads that run without ending a branch, in rising order."""
        return tuple(sorted({*self.kept, *((self.own_exit,) if self.own_exit else ())}))

    def keeping(self, depths: tuple[int, ...]) -> Self:
        """Return this work with the gaps of these exits remembered too."""
        return replace(self, kept=tuple(sorted({*self.kept, *depths})))
