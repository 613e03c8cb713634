"""DepthPlan: for each sampling step and guidance branch, what to run. Plain data."""

import itertools
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from dyndit import files
from dyndit.errors import PlanError

FORMAT = "dyndit-plan"
VERSION = 1

REUSED = -1
"""An unconditional depth: no pass at this step, the difference between the branches is that of the last guided one."""


def own_exit(depth: int) -> int:
    """An unconditional depth: no pass at this step, the conditional branch is guided by its own exit at `depth`.

    The exit is the weaker model that the prediction is pushed away from, as in autoguidance (Karras et al. 2024,
    "Guiding a Diffusion Model with a Bad Version of Itself", arXiv:2406.02507), but of the same pass: it costs a head.
    """
    return REUSED - depth


def guide_of(uncond: int) -> int:
    """The depth of the conditional branch's own exit that guides it; 0 where the unconditional depth says otherwise."""
    return REUSED - uncond if uncond < REUSED else 0


def forecast(depth: int) -> int:
    """A conditional depth: leave at `depth`, and add what full depth would add there, forecast from earlier steps.

    `dyndit.models.forecasts` tells how. Features of earlier steps serve longer where they are extrapolated (TaylorSeer, Liu et
    al. 2025, arXiv:2503.06923); here only what the exit lacks is.
    """
    return -depth


def written(uncond: int) -> str:
    """An unconditional depth as it is printed: "e4" is the own exit at 4."""
    return f"e{guide_of(uncond)}" if uncond < REUSED else "reuse" if uncond == REUSED else str(uncond)


def written_cond(cond: int) -> str:
    """A conditional depth as it is printed: "4+" is the exit at 4 with the rest forecast."""
    return str(cond) if cond > 0 else f"{-cond}+"


@dataclass(frozen=True)
class DepthPlan:
    """Depths of both guidance branches at every sampling step, from the noisiest step to the last.

    A depth of L (`num_blocks`) is the full model. An unconditional depth of 0 means no unconditional pass at that
    step, hence no guidance there; REUSED means no pass either, but guidance by the difference that the branches had at
    the last step that ran both (none, where there was no such step); `own_exit(d)` means guidance by the conditional
    branch's own exit at depth d, below its depth at that step. A plan whose unconditional depths are all 0 is unguided.
    A conditional depth of `forecast(d)` leaves at d and forecasts the rest from earlier steps at full depth; such a
    step runs no unconditional pass.
    """

    timesteps: tuple[float, ...]
    """The solver's timesteps, falling from noise to picture; whole ones are kept as integers."""
    cond: tuple[int, ...]
    uncond: tuple[int, ...]
    num_blocks: int
    solver: str
    router: str = "full"
    """Who wrote the plan."""
    cfg_scale: float = 1.0
    budget: float | None = None
    """Share of the full plan's predicted time the plan was written for."""
    trunk: str = ""
    """Hash of the trunk it was calibrated on; "" for a schedule that fits any trunk of this depth."""
    exits: str = ""
    """Hash of the exits it was calibrated on, likewise."""
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    """What the router predicted and measured: shares of time and blocks, Fréchet distances."""

    def __post_init__(self) -> None:
        timesteps = tuple(int(t) if float(t).is_integer() else float(t) for t in self.timesteps)
        object.__setattr__(self, "timesteps", timesteps)
        for name in ("cond", "uncond"):
            object.__setattr__(self, name, tuple(operator.index(v) for v in getattr(self, name)))
        if not self.timesteps:
            raise PlanError("plan: no steps")
        if any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise PlanError("plan: timesteps must fall from noise to picture")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PlanError(f"plan: budget {self.budget:g}, expected above 0 and at most 1")
        for name, least in (("cond", forecast(self.num_blocks - 1)), ("uncond", own_exit(self.num_blocks - 1))):
            depths = getattr(self, name)
            if len(depths) != len(self.timesteps):
                raise PlanError(f"plan: {len(depths)} {name} depths for {len(self.timesteps)} timesteps")
            if bad := [d for d in depths if not least <= d <= self.num_blocks or (name == "cond" and d == 0)]:
                least = 1 if name == "cond" and bad[0] >= 0 else least
                raise PlanError(f"plan: {name} depth {bad[0]} outside {least}..{self.num_blocks}")
        for depth, guide in zip(self.run_depths, map(guide_of, self.uncond), strict=True):
            if guide >= depth:
                raise PlanError(f"plan: guided by its own exit at {guide}, expected one below its depth {depth}")
        for step, (cond, uncond) in enumerate(self.pairs):
            if cond < 0 and self.num_blocks not in self.cond[:step]:
                raise PlanError(f"plan: step {step} forecasts, but no step before it is at full depth")
            if cond < 0 < uncond:
                raise PlanError(f"plan: step {step} forecasts beside an unconditional pass; expected none")

    @classmethod
    def full(cls, timesteps: tuple[float, ...], num_blocks: int, solver: str, cfg_scale: float = 1.0) -> Self:
        """The original model at every step; both branches where `cfg_scale` is not 1."""
        depths = (num_blocks,) * len(timesteps)
        return cls(
            timesteps,
            depths,
            depths if cfg_scale != 1 else (0,) * len(timesteps),
            num_blocks,
            solver,
            cfg_scale=cfg_scale,
        )

    @property
    def num_steps(self) -> int:
        """Number of sampling steps."""
        return len(self.timesteps)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(conditional, unconditional) depth of every step."""
        return tuple(zip(self.cond, self.uncond, strict=True))

    @property
    def guided(self) -> bool:
        """Whether any step runs the unconditional branch."""
        return any(depth > 0 for depth in self.uncond)

    @property
    def reuses(self) -> bool:
        """Whether any step takes the difference between the branches from an earlier one."""
        return REUSED in self.uncond

    @property
    def run_depths(self) -> tuple[int, ...]:
        """Blocks that the conditional branch runs at every step."""
        return tuple(map(abs, self.cond))

    @property
    def forecasts(self) -> bool:
        """Whether any step forecasts what lies beyond its exit."""
        return min(self.cond) < 0

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """Per step, the exits whose gap to full depth a later step forecasts from: of the last two at full depth."""
        kept: list[set[int]] = [set() for _ in self.cond]
        full: list[int] = []
        for step, depth in enumerate(self.cond):
            if depth == self.num_blocks:
                full.append(step)
            elif depth < 0:
                for earlier in full[-2:]:
                    kept[earlier].add(-depth)
        return tuple(tuple(sorted(depths)) for depths in kept)

    @property
    def guides(self) -> tuple[int, ...]:
        """Depth of the own exit that guides each step; 0 where none does."""
        return tuple(map(guide_of, self.uncond))

    @property
    def share_of_blocks(self) -> float:
        """Blocks run, as a share of the full plan's (of both branches where the plan is for guided sampling)."""
        branches = 2 if self.cfg_scale != 1 else 1
        run = sum(self.run_depths) + sum(max(depth, 0) for depth in self.uncond)
        return run / (branches * self.num_blocks * self.num_steps)

    @property
    def mean_depth(self) -> tuple[float, float]:
        """Mean depth of the conditional and of the unconditional branch."""
        return sum(self.run_depths) / self.num_steps, sum(max(depth, 0) for depth in self.uncond) / self.num_steps

    def with_pairs(self, pairs: list[tuple[int, int]] | tuple[tuple[int, int], ...], **changes: object) -> Self:
        """The same steps with other depths."""
        cond, uncond = zip(*pairs, strict=True)
        return replace(self, cond=cond, uncond=uncond, **changes)

    def difference(self, other: Self) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
        """Steps at which two plans differ: (step, depths here, depths there).

        Raises:
            PlanError: the plans have different timesteps.
        """
        if self.timesteps != other.timesteps:
            raise PlanError(f"plans of {self.num_steps} and {other.num_steps} steps have different timesteps")
        both = zip(self.pairs, other.pairs, strict=True)
        return [(step, here, there) for step, (here, there) in enumerate(both) if here != there]

    def check(
        self,
        *,
        depths: tuple[int, ...],
        trunk: str | None = None,
        exits: str | None = None,
        timesteps: tuple[int, ...] | None = None,
        solver: str | None = None,
        origin: str = "plan",
    ) -> None:
        """Refuse a plan that does not fit.

        Raises:
            PlanError: another depth, trunk, set of exits, solver or timesteps; `origin` names the file or flag.
        """
        if self.num_blocks != depths[-1]:
            raise PlanError(f"{origin}: made for {self.num_blocks} blocks, but the model has {depths[-1]}")
        if solver is not None and self.solver != solver:
            raise PlanError(f"{origin}: made for solver {self.solver}, but {solver} is asked for")
        if timesteps is not None and self.timesteps != timesteps:
            found = f"{self.num_steps} steps" if self.num_steps != len(timesteps) else "other timesteps"
            raise PlanError(f"{origin}: made for {found}, but {len(timesteps)} steps of {self.solver} are asked for")
        for name, mine, theirs in (("trunk", self.trunk, trunk), ("set of exits", self.exits, exits)):
            if mine and theirs is not None and mine != theirs:
                raise PlanError(f"{origin}: made for {name} {mine}, but the model's is {theirs or 'absent'}")
        if missing := sorted({d for d in (*self.run_depths, *self.uncond, *self.guides) if d > 0} - set(depths)):
            raise PlanError(f"{origin}: depth {missing[0]} has no exit; the model has {list(depths)}")

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        files.write_json(Path(path), {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read JSON.

        Raises:
            PlanError: the file is missing, no JSON, or no plan of this version.
        """
        data = files.read_json(Path(path), PlanError)
        if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise PlanError(f"{path}: expected a {FORMAT} file of version {VERSION}")
        try:
            return cls(**{k: v for k, v in data.items() if k not in ("format", "version")})
        except (TypeError, ValueError) as error:
            raise PlanError(f"{path}: {error}") from error

    def __str__(self) -> str:
        """A line per branch: the depths, from the noisiest step to the last."""
        head = f"{self.router}, {self.solver}, {self.num_steps} steps, {self.share_of_blocks:.0%} of the blocks"
        lines = [("t", self.timesteps), ("cond", tuple(map(written_cond, self.cond)))]
        lines.append(("uncond", tuple(map(written, self.uncond))))
        return "\n".join([head, *(f"  {name:>6}  " + " ".join(f"{v:>4}" for v in row) for name, row in lines)])


Router = Callable[[DepthPlan, tuple[int, ...]], DepthPlan]
"""Writes a plan: (the full plan of a sampling, the depths there are) -> plan. `functools.partial(ramp, start=4)` is
one, `ShiftTable.router(0.6)` another."""
