"""What the network runs at one sampling step: the one description that samplers, costs and the plug-in read."""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Work:
    """The branches and heads of one step.

    Example: `Work((12, 6))` runs 12 blocks with the condition and 6 without it; `Work((8,), own_exit=4)` runs 8 blocks
    and, on the way, the exit head after block 4.
    """

    depths: tuple[int, ...]
    """Blocks that each branch runs: the conditional branch first, the unconditional one second where there is one."""
    own_exit: int = 0
    """Depth of the conditional branch's exit that guides it; 0: none does."""
    held: bool = False
    """Guide by the difference that both branches had at the last step that ran both."""
    forecast: bool = False
    """Add to the conditional exit what full depth would add, forecast from earlier steps."""
    kept: tuple[int, ...] = ()
    """Exits whose gap to full depth is remembered for later forecasts, rising. Their heads run at this step."""

    @property
    def blocks(self) -> int:
        """Blocks run, over all branches."""
        return sum(self.depths)

    @property
    def heads_on_the_way(self) -> tuple[int, ...]:
        """Exit heads that run besides those that branches leave by, rising."""
        return tuple(sorted({*self.kept, *((self.own_exit,) if self.own_exit else ())}))

    def keeping(self, depths: tuple[int, ...]) -> Self:
        """The same work, with the gaps of these exits remembered too."""
        return replace(self, kept=tuple(sorted({*self.kept, *depths})))
