"""A step of a plan as typed data: the depth of the conditional branch, and its guide."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from dyndit import bounds
from dyndit.errors import PlanError
from dyndit.models.dynamic import Work


@dataclass(frozen=True)
class NoGuide:
    """No guidance at this step, and no unconditional pass."""

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class Unconditional:
    """Guidance by an unconditional pass of `depth` blocks (Ho and Salimans 2022, arXiv:2207.12598)."""

    depth: int

    def __str__(self) -> str:
        return str(self.depth)


@dataclass(frozen=True)
class OwnExit:
    """Guidance by the conditional branch's own exit at `depth`, for the price of a head.

    Guidance pushes the prediction away from the exit, a weaker model, as in autoguidance (Karras et al. 2024,
    arXiv:2406.02507). Internal Guidance (arXiv:2512.24176) also guides by an intermediate head.
    """

    depth: int

    def __str__(self) -> str:
        return f"e{self.depth}"


@dataclass(frozen=True)
class Held:
    """Guidance by the branches' difference at the last step that ran both. Before such a step, nothing guides."""

    def __str__(self) -> str:
        return "held"


Guide = NoGuide | Unconditional | OwnExit | Held

WEAKEST, STRONGEST = 0.01, 100.0
"""Bounds of a step's strength. Between them, Python writes numbers without an exponent."""

_TEXT = re.compile(
    r"(?P<depth>[1-9]\d*)(?P<forecast>\+?)"
    r"(\|((?P<uncond>[1-9]\d*)|e(?P<own>[1-9]\d*)|(?P<held>held))(\*(?P<strength>\d+(\.\d+)?))?)?",
    re.ASCII,
)


@dataclass(frozen=True)
class Step:
    """One sampling step: `depth` blocks of the conditional branch, and its guide: `dyndit.Step.parse("12|6")`.

    As text: "12|6" runs 12 blocks with the condition and 6 without. "8|e4" is guided by its own exit at 4. "4+" leaves
    at 4 and forecasts the rest. "4+|held" also holds the last guidance. "12" is not guided. "12|6*1.5" is guided one
    and a half times as strongly as the plan's scale says.

    Raises:
        PlanError: a depth below 1, a guide that is no `Guide`, an own exit not below the depth, a forecast together
            with an unconditional pass, or a strength beyond its bounds, or of no guide.
    """

    depth: int
    guide: Guide = field(default_factory=NoGuide)
    forecast: bool = False
    """Add to the exit at `depth` its gap to full depth, forecast from earlier full-depth steps.

    Extrapolated features serve longer than held features (TaylorSeer, Liu et al. 2025, arXiv:2503.06923). A step
    extrapolates only the exit's gap (`dyndit.models.forecasts`).
    """
    strength: float = 1.0
    """Factor of the guidance, 0.01 to 100: at the plan's scale s the step is guided at scale 1 + strength * (s - 1)."""

    def __post_init__(self) -> None:
        if not isinstance(self.guide, Guide):
            raise PlanError(f"step {self.depth}: guide {self.guide!r:.40}, expected a `Guide`")
        depths = (self.depth, getattr(self.guide, "depth", 1))
        if any(not isinstance(depth, int) or isinstance(depth, bool) or depth < 1 for depth in depths):
            raise PlanError(f"step {self!s}: expected whole depths of at least 1")
        if not bounds.is_number(self.strength) or not WEAKEST <= self.strength <= STRONGEST:
            expected = f"a number from {WEAKEST:g} to {STRONGEST:g}"
            raise PlanError(f"step {self.depth}: guidance of strength {self.strength!r:.40}, expected {expected}")
        object.__setattr__(self, "strength", float(self.strength))  # numpy's numbers print in another way
        if self.strength != 1 and self.guide == NoGuide():
            raise PlanError(f"step {self.depth}: guidance of strength {self.strength:g} without a guide, expected 1")
        if isinstance(self.guide, OwnExit) and self.guide.depth >= self.depth:
            raise PlanError(
                f"step {self!s}: guided by its own exit at {self.guide.depth}, expected one below {self.depth}"
            )
        if self.forecast and isinstance(self.guide, Unconditional):
            raise PlanError(f"step {self!s}: forecasts beside an unconditional pass; expected none")

    @classmethod
    def equal(cls, depth: int, guided: bool) -> Self:
        """Run both branches at `depth`, or the conditional branch alone if not guided."""
        return cls(depth, Unconditional(depth) if guided else NoGuide())

    def unguided(self) -> Self:
        """Return this step without its guide."""
        return replace(self, guide=NoGuide(), strength=1.0)

    def work(self) -> Work:
        """Return the branches and heads that run: `Step.parse("12|6").work()` is `Work((12, 6))`."""
        alone = Work((self.depth,), forecast=self.forecast, strength=self.strength)
        match self.guide:
            case Unconditional(depth):
                return replace(alone, depths=(self.depth, depth))
            case OwnExit(depth):
                return replace(alone, own_exit=depth)
            case Held():
                return replace(alone, held=True)
            case _:
                return alone

    @property
    def exits(self) -> tuple[int, ...]:
        """Return every depth at which this step reads a prediction: the model's exits, or L."""
        work = self.work()
        return (*work.depths, *work.heads_on_the_way)

    def __str__(self) -> str:
        guide = str(self.guide)
        strength = "" if self.strength == 1 else f"*{self.strength!r}".removesuffix(".0")
        return f"{self.depth}{'+' * self.forecast}" + (f"|{guide}{strength}" if guide else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text that `str` writes. Raises PlanError for any other text."""
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise PlanError(f"step {text!r:.40}: expected a depth such as '12', '12|6', '8|e4*2', '4+' or '4+|held'")
        guide: Guide = NoGuide()
        if found["held"]:
            guide = Held()
        elif found["uncond"]:
            guide = Unconditional(int(found["uncond"]))
        elif found["own"]:
            guide = OwnExit(int(found["own"]))
        step = cls(int(found["depth"]), guide, bool(found["forecast"]), float(found["strength"] or 1))
        if str(step) != text:
            raise PlanError(f"step {text!r:.40}: expected a depth such as {step!s}")
        return step

    @classmethod
    def of_version_1(cls, cond: int, uncond: int) -> Self:
        """Read the two whole numbers of a version 1 plan.

        cond: a depth, or minus a depth that forecasts. uncond: a depth; 0: no guide; -1: held; -1 - d: own exit at d.
        """
        guide: Guide = NoGuide() if uncond == 0 else Held() if uncond == -1 else Unconditional(uncond)
        if uncond < -1:
            guide = OwnExit(-1 - uncond)
        return cls(abs(cond), guide, cond < 0)


def steps(*texts: str) -> tuple[Step, ...]:
    """Parse several steps: `steps("12|6", "8|e4")`."""
    return tuple(map(Step.parse, texts))


def locked(choices: Sequence[Step | str], guide: Guide) -> tuple[Step, ...]:
    """Give every choice this guide: `locked(("12|6", "8"), OwnExit(4))` is `steps("12|e4", "8|e4")`.

    Choices that cannot have it drop out: those not deeper than an own exit, and forecasts beside a pass. So does the
    original model's step, which every table has. Strengths become 1. A search on the rest cannot choose its guidance.
    """
    found = []
    for step in (Step.parse(choice) if isinstance(choice, str) else choice for choice in choices):
        shallow = isinstance(guide, OwnExit) and guide.depth >= step.depth
        beside_pass = isinstance(guide, Unconditional) and (step.forecast or guide.depth == step.depth)
        if not (shallow or beside_pass):
            found.append(replace(step.unguided(), guide=guide))
    return tuple(dict.fromkeys(found))
