"""Describe a rival whose settings are chosen before anything is scored. `tuned.Tuned` chooses them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from dyndit.analysis.compare.peers import PeerSettings
from dyndit.errors import InputError

SLACK = 1.02
"""A setting may take this much more than the time it is matched to: times are known to about two percent."""


@dataclass(frozen=True)
class Tuning:
    """A grid of settings, of which the one of least Fréchet distance on the calibration seeds becomes an arm.

    peers and scales are combined, peers slowest. A scale of 1 has no unconditional pass.
    """

    family: str
    peers: tuple[PeerSettings, ...]
    scales: tuple[float, ...] = (1.5,)
    """Guidance scales."""
    solver: str = "unipc"
    steps: tuple[int, ...] = (20,)
    """Step counts that a setting may have."""
    share: float | None = None
    """Limit of time, as a share of full depth's at `reference` steps and the experiment's scale; None: no limit."""
    reference: int = 20
    counts: int = 1
    """Step counts to draw of each setting: the largest ones within the limit. 0: all of them."""
    minutes: float = 0.0
    """Minutes of training, timing and drawing. Settings that come later are left out. 0: no limit."""
    group: str = ""
    """Tunings of one group compete: the one of least distance on the calibration seeds is the arm, of this family."""
    matched: bool = False
    """Give the arm the searched plan's time of this share, or the next slower step count (`tuned.matched`)."""

    def __post_init__(self) -> None:
        for name in ("peers", "scales", "steps"):
            if not getattr(self, name):
                raise InputError(f"tuning {self.family}: no {name}, expected at least one")
        if self.share is not None and not self.share > 0:
            raise InputError(f"tuning {self.family}: share {self.share:g}, expected above 0")
        for name in ("counts", "minutes"):
            if not getattr(self, name) >= 0:
                raise InputError(f"tuning {self.family}: {name} {getattr(self, name):g}, expected at least 0")

    def settings(self) -> Iterator[tuple[PeerSettings, float]]:
        """Yield each peer with each scale."""
        return product(self.peers, self.scales)
