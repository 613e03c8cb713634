"""Define a peer: a frozen dataclass of settings that gives the model to run and its plan.

A peer that only changes the plan overrides `plan`. Any other peer overrides `model` and returns a `Peer`: a
`DynamicDepth` on the same modules with another `predict`. Sampling loop, scoring and timing stay the same.
"""

from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import ClassVar, Self

from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures
from dyndit.training.train import Train


@dataclass(frozen=True)
class PeerContext:
    """Data and budget for a peer that trains its own weights.

    out: the folder that keeps the trained weights. data: the pictures of the comparison. fit: the exits' distillation
    settings, also the peer's budget. train: recipe to train a backbone from scratch, for a peer that trains a smaller
    backbone; None if the comparison has no such recipe.
    """

    out: Path
    data: Pictures
    fit: FitConfig
    train: Train | None = None


@dataclass(frozen=True)
class PeerSettings:
    """The settings of a peer. Subclasses add fields: plain numbers and words.

    `peers.peers()` finds every subclass in this package, and the test suite runs it.
    """

    name: ClassVar[str]
    """The family in runs.csv."""

    @classmethod
    def off(cls) -> Self | None:
        """Return settings that make the peer the full model, bit for bit; None if no settings do."""
        return None

    @classmethod
    def available(cls) -> bool:
        """Return True if the peer's library is installed."""
        return True

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Return the settings to compare: spread over the peer's possible savings on the digits at 10 steps."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Return the settings in an arm's name, such as "every2-depth4"."""
        return "-".join(f"{f.name}{_plain(getattr(self, f.name))}" for f in fields(self))

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Return the model to run; by default `model` itself. Only a peer that trains needs a context."""
        return model

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Return the plan to run.  full: the full plan, depths: the depths of the model that `model` returned."""
        return full

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return blocks run over the full model's blocks at the same steps with guidance; None if the data decide."""
        return plan.share_of_blocks


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def grid(settings: type[PeerSettings], **choices: tuple[object, ...]) -> tuple[PeerSettings, ...]:
    """Combine all values: grid(Stale, every=(2, 3), depth=(4, 6)) returns four settings."""
    return tuple(settings(**dict(zip(choices, values, strict=True))) for values in product(*choices.values()))


class Peer(DynamicDepth):
    """The full model's modules with another way to run them. Subclasses override `predict`.

    `predict` takes and returns the memory: all that a step keeps for the next step. The module itself keeps nothing. A
    new trajectory starts with memory None, and a fork gets its own copy.
    """

    def __init__(self, model: DynamicDepth, settings: PeerSettings) -> None:
        super().__init__(model.backbone, None, pixel_space=model.pixel_space, process=model.process)
        self.settings = settings
        self.eval()
