"""What every peer is: a frozen dataclass of settings that says which model runs, under which plan.

A peer that is a plan overrides `plan`. One that is none overrides `model` and returns a `Peer`: a `DynamicDepth` on the
same modules whose `predict` differs, so that the one sampling loop, scoring and timing serve it unchanged.
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
    """What a peer that has weights of its own may train them with.

    out: a folder for what it trains, where it finds it again; data: the pictures of the comparison; fit: how the exits
    were distilled, which is the budget that a peer may spend too. train: how the comparison trains its backbone from
    scratch, for a peer that trains a smaller one; None if the comparison does not say.
    """

    out: Path
    data: Pictures
    fit: FitConfig
    train: Train | None = None


@dataclass(frozen=True)
class PeerSettings:
    """A peer and how it is set; subclasses add fields, plain numbers and words.

    Every subclass in this package is found by itself (`peers.peers()`) and runs in the test suite.
    """

    name: ClassVar[str]
    """The family in runs.csv."""

    @classmethod
    def off(cls) -> Self | None:
        """Settings under which the peer is the full model, bit for bit; None where there are none."""
        return None

    @classmethod
    def available(cls) -> bool:
        """Whether the library that it runs on is installed."""
        return True

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Settings that spread over what the peer can save on the digits at 10 steps: what a comparison takes."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The settings in an arm's name, such as "every2-depth4"."""
        return "-".join(f"{f.name}{_plain(getattr(self, f.name))}" for f in fields(self))

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """What runs; by default the model itself. Only a peer that trains needs a context."""
        return model

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """What it runs: a router. `full` is the full plan, `depths` those of what `model` returned."""
        return full

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Blocks run, over those of the full model at the same steps with guidance; None where the data decide."""
        return plan.share_of_blocks


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "_".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def grid(settings: type[PeerSettings], **choices: tuple[object, ...]) -> tuple[PeerSettings, ...]:
    """Every combination: grid(Stale, every=(2, 3), depth=(4, 6))."""
    return tuple(settings(**dict(zip(choices, values, strict=True))) for values in product(*choices.values()))


class Peer(DynamicDepth):
    """The full model's modules, run another way: subclasses override `predict`.

    What a step leaves for the next goes out in the memory and comes in with it. Nothing is kept in the module: a new
    trajectory starts with memory None, and a fork gets its own copy.
    """

    def __init__(self, model: DynamicDepth, settings: PeerSettings) -> None:
        super().__init__(model.backbone, None, pixel_space=model.pixel_space, process=model.process)
        self.settings = settings
        self.eval()
