"""Define a peer: a frozen dataclass of settings that gives the model to run and its plan.

A peer that only changes the plan overrides `plan`. Any other peer overrides `model` and returns a `Peer`: a
`DynamicDepth` on the same modules with another `predict`. Sampling loop, scoring and timing stay the same.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import ClassVar, Self

from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.storage import load as checkpoints
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures
from dyndit.training.train import Train


@dataclass(frozen=True)
class PeerContext:
    """Data and budget for a peer that trains its own weights.

    out: keeps the weights. data: the pictures of the comparison. fit: the exits' distillation settings, also the peer's
    budget. train: recipe of a backbone from scratch, for a peer with a smaller one; None: there is no such recipe.
    """

    out: Path
    data: Pictures
    fit: FitConfig
    train: Train | None = None

    def trained(self, name: str, made_of: str, train: Callable[[Path], DynamicDepth]) -> DynamicDepth:
        """Load the model that `train`, given a folder to work in, once made of this; or make it and save it."""
        key = hashlib.sha256(made_of.encode()).hexdigest()
        folder = self.out / f"{name}-{key[:8]}"
        if not (folder / checkpoints.CONFIG).exists():
            checkpoints.save(train(folder.with_name(f"{folder.name}-training")), folder)
        return checkpoints.load(folder)


@dataclass(frozen=True)
class PeerSettings:
    """The settings of a peer. Subclasses add fields: plain numbers and words.

    `peers.peers()` finds every subclass in this package, and the test suite runs it.
    """

    name: ClassVar[str]
    """The family in runs.csv."""
    switched_off: ClassVar[Mapping[str, object] | None] = None
    """Settings that make the peer the full model, bit for bit; None if no settings do."""
    compared: ClassVar[tuple[tuple[object, ...], ...]]
    """Settings to compare: spread over the peer's possible savings on the digits at 10 DDIM steps."""
    least: ClassVar[Mapping[str, float]] = {}
    """The smallest value of each field that has one."""

    def __post_init__(self) -> None:
        for name, lowest in self.least.items():
            if not (value := getattr(self, name)) >= lowest:
                raise InputError(f"peer {self.name}: {name} {_plain(value)}, expected at least {lowest}")

    @classmethod
    def off(cls) -> Self | None:
        """Return the settings that switch the peer off, if there are any."""
        return None if cls.switched_off is None else cls(**cls.switched_off)

    @classmethod
    def available(cls) -> bool:
        """Return True if the peer's library is installed."""
        return True

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Return the settings to compare."""
        return tuple(cls(*values) for values in cls.compared)

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

    `predict` takes and returns the memory: all that a step keeps for the next. A new trajectory starts with None.
    """

    def __init__(self, model: DynamicDepth, settings: PeerSettings) -> None:
        super().__init__(model.backbone, None, pixel_space=model.pixel_space, process=model.process)
        self.settings = settings
        self.eval()
