"""Run the fixed, time-dependent exit schedule of ASE on our exits.

Moon et al. (ICML 2024), "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models",
arXiv:2408.05927. The depth is a fixed function of the timestep, equal for both guidance branches, deepest near the
picture. Ten equal ranges of timesteps form five pairs, each pair shallower by an equal number of blocks. The authors'
code (taehong-moon/ee-diffusion, DiT/drop_scheduler.py) runs 28, 28, 24, 24, 20, 20, 16, 16, 12, 12 of 28 blocks from
t = 0 up: `drop` = 4/7 here. ASE also fine-tunes the whole backbone for one schedule and shares the final layer. Here
the backbone is frozen and each depth has its distilled exit, so the comparison tests the schedule alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from dyndit.analysis.compare.peers.base import PeerSettings
from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step, Unconditional

NUM_TIMESTEPS, NUM_RANGES = 1000, 10


@dataclass(frozen=True)
class FixedExits(PeerSettings):
    """drop: share of the blocks dropped in the two noisiest ranges; 0 in the two ranges nearest to the picture."""

    name: ClassVar[str] = "ase"
    switched_off: ClassVar = {"drop": 0.0}
    """No block dropped."""
    compared: ClassVar = ((2 / 7,), (4 / 7,), (6 / 7,))
    """A gentler slope, the authors' own and a steeper one."""
    drop: float = 4 / 7

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise InputError(f"ase drop {self.drop:g}: expected at least 0 and below 1")

    @property
    def label(self) -> str:
        """Return the slope with two digits, such as "drop0.57"."""
        return f"drop{self.drop:.2f}"

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Set each step's depth from its timestep, at the nearest exit; on a tie the deeper exit."""
        steps = []
        for timestep, step in zip(full.timesteps, full.steps, strict=True):
            wanted = full.num_blocks * (1 - self.drop * _stage(timestep))
            depth = min(depths, key=lambda d, wanted=wanted: (round(abs(d - wanted), 9), -d))
            steps.append(Step.equal(depth, isinstance(step.guide, Unconditional)))
        return full.with_steps(steps, router="ase", settings={"drop": self.drop})


def _stage(timestep: float) -> float:
    """Return 0 in the two ranges nearest to the picture, rising to 1 in the two noisiest ranges."""
    pairs = NUM_RANGES // 2
    return min(int(timestep * pairs / NUM_TIMESTEPS), pairs - 1) / (pairs - 1)
