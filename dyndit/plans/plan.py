"""DepthPlan: the work of each sampling step. Plain data, saved as JSON."""

import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from dyndit import bounds, files, seals
from dyndit.errors import PlanError, first_line
from dyndit.models.dynamic import DynamicDepth, Work
from dyndit.models.identity import VERSION_1
from dyndit.plans.step import Held, NoGuide, Step, Unconditional
from dyndit.process import Process

FORMAT = "dyndit-plan"
VERSION = 2
MANUAL = "manual"
"""Router of plans that were written or edited by hand. Only their files need no checksum."""

_BLOCKS = bounds.Bound(1, 10**6, whole=True)
_UNSEALED, _UNBOUND = "version 1: no checksum", "version 1: no checksum, no backbone"

REACH = 2.0
"""A rescaled forecast may reach this far beyond its last two full-depth steps, as a multiple of their distance."""


@dataclass(frozen=True, repr=False)
class DepthPlan:
    """The steps of a sampling, from the noisiest step to the last.

        plan = dyndit.DepthPlan.load("plan.json")
        print(plan, plan.depths, plan.share_of_blocks)
        plan.with_steps([*plan.steps[:-1], dyndit.Step.parse("12|12")], router="mine").save("careful.json")

    A depth of L (`num_blocks`) is the full model. A plan of guidance scale 1 has no guides.

    Raises:
        PlanError: no steps, timesteps that do not fall, unequal numbers of steps and timesteps, a depth beyond L, a
            forecast without an earlier step at full depth, or a guide at guidance scale 1.
    """

    timesteps: tuple[float, ...]
    """The solver's timesteps, falling from noise to picture. Whole timesteps are kept as integers."""
    steps: tuple[Step, ...]
    num_blocks: int
    solver: str
    router: str = "full"
    """Name of the router that wrote the plan: "full", "ramp", "searched", ..."""
    settings: dict[str, float] = field(default_factory=dict)
    """Settings of the router, for example `{"start": 4, "end": 12, "power": 1}`."""
    cfg_scale: float = 1.0
    budget: float | None = None
    """Share of the full plan's predicted time that the plan was written for."""
    backbone: str = ""
    """Identity of the backbone that the plan was calibrated on; "" if it fits any backbone of this depth."""
    exits: str = ""
    """Identity of the exits that the plan was calibrated on; "" if it fits any exits."""
    calls: tuple[int, ...] = ()
    """Calls of the network at each step; empty if every step makes one. Heun's solver makes two after its first."""
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    """Figures that the router predicted or measured: shares of time and blocks, Fréchet distances."""
    note: str = field(default="", compare=False)
    """How far the plan's file can be trusted, printed wherever the plan is: "version 1: no checksum". "" if sealed."""

    def __post_init__(self) -> None:
        self._check_types()
        timesteps = tuple(int(t) if float(t).is_integer() else float(t) for t in self.timesteps)
        object.__setattr__(self, "timesteps", timesteps)
        if isinstance(self.steps, str):
            raise PlanError(f"plan: steps {self.steps!r:.40}, expected one text per step")
        steps = tuple(step if isinstance(step, Step) else Step.parse(step) for step in self.steps)
        object.__setattr__(self, "steps", steps)
        if not self.timesteps:
            raise PlanError("plan: no steps")
        if any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise PlanError("plan: timesteps must fall from noise to picture")
        calls = tuple(self.calls)
        if calls and (len(calls) != len(self.timesteps) or not all(type(c) is int and c >= 1 for c in calls)):
            raise PlanError(f"plan: calls {list(calls)!s:.40}, expected a whole number for each step")
        object.__setattr__(self, "calls", () if set(calls) == {1} else calls)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PlanError(f"plan: budget {self.budget:g}, expected above 0 and at most 1")
        if len(self.steps) != len(self.timesteps):
            raise PlanError(f"plan: {len(self.steps)} steps for {len(self.timesteps)} timesteps")
        for k, step in enumerate(self.steps):
            if max(step.exits) > self.num_blocks:
                raise PlanError(f"plan: step {k} ({step}) goes beyond {self.num_blocks} blocks")
            if step.forecast and not any(earlier.depth == self.num_blocks for earlier in self.steps[:k]):
                raise PlanError(f"plan: step {k} forecasts, but no step before it is at full depth")
            if step.forecast and step.depth == self.num_blocks:
                raise PlanError(f"plan: step {k} ({step}) forecasts at full depth, which lacks nothing")
            if self.cfg_scale == 1 and step.guide != NoGuide():
                raise PlanError(f"plan: step {k} ({step}) is guided, but the guidance scale is 1")

    def _check_types(self) -> None:
        """Refuse fields of another type, or numbers that are not finite."""
        for name in ("solver", "router", "backbone", "exits", "note"):
            if not isinstance(value := getattr(self, name), str):
                raise PlanError(f"plan: {name} {value!r:.40}, expected text")
        for name in ("settings", "figures"):
            if not isinstance(value := getattr(self, name), dict) or not all(isinstance(key, str) for key in value):
                raise PlanError(f"plan: {name} {value!r:.40}, expected numbers by name")
        if not _BLOCKS.holds(self.num_blocks):
            raise PlanError(f"plan: num_blocks {self.num_blocks!r:.40}, expected {_BLOCKS}")
        if isinstance(self.timesteps, str | dict) or not hasattr(self.timesteps, "__iter__"):
            raise PlanError(f"plan: timesteps {self.timesteps!r:.40}, expected a number per step")
        numbers = {"cfg_scale": self.cfg_scale, **({} if self.budget is None else {"budget": self.budget})}
        numbers |= {f"timestep {k}": t for k, t in enumerate(self.timesteps)} | self.settings | self.figures
        for name, value in numbers.items():
            if not bounds.is_number(value):
                raise PlanError(f"plan: {name} {value!r:.40}, expected a finite number")

    @classmethod
    def full(
        cls,
        timesteps: Sequence[float],
        num_blocks: int,
        solver: str,
        cfg_scale: float = 1.0,
        calls: tuple[int, ...] = (),
    ) -> Self:
        """Return the plan of the original model: both branches at every step unless `cfg_scale` is 1."""
        step = full_step(num_blocks, cfg_scale)
        return cls(tuple(timesteps), (step,) * len(timesteps), num_blocks, solver, cfg_scale=cfg_scale, calls=calls)

    @property
    def num_steps(self) -> int:
        """Return the number of sampling steps."""
        return len(self.timesteps)

    @property
    def calls_by_step(self) -> tuple[int, ...]:
        """Return the calls of the network at each step."""
        return self.calls or (1,) * self.num_steps

    @property
    def guided(self) -> bool:
        """Tell if any step runs the unconditional branch."""
        return any(isinstance(step.guide, Unconditional) for step in self.steps)

    @property
    def depths(self) -> tuple[int, ...]:
        """Return the blocks that the conditional branch runs at every step."""
        return tuple(step.depth for step in self.steps)

    @property
    def uncond_depths(self) -> tuple[int, ...]:
        """Return the blocks that the unconditional branch runs at every step; 0 without a pass."""
        return tuple(sum(step.work().depths[1:]) for step in self.steps)

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Return the work of every step: `step.work()` with the gaps that later forecasts need.

        A forecast builds on the last two full-depth steps before it.
        """
        kept: list[set[int]] = [set() for _ in self.steps]
        full: list[int] = []
        for k, step in enumerate(self.steps):
            if step.depth == self.num_blocks:
                full.append(k)
            elif step.forecast:
                for earlier in full[-2:]:
                    kept[earlier].add(step.depth)
        return tuple(step.work().keeping(tuple(depths)) for step, depths in zip(self.steps, kept, strict=True))

    @property
    def share_of_blocks(self) -> float:
        """Return the blocks run as a share of the full plan's blocks, over both branches if guided."""
        full = full_step(self.num_blocks, self.cfg_scale).work().blocks
        blocks = sum(n * step.work().blocks for n, step in zip(self.calls_by_step, self.steps, strict=True))
        return blocks / (full * sum(self.calls_by_step))

    @property
    def mean_depth(self) -> tuple[float, float]:
        """Return the mean depth of the conditional and of the unconditional branch."""
        return sum(self.depths) / self.num_steps, sum(self.uncond_depths) / self.num_steps

    @property
    def settings_text(self) -> str:
        """Write the router's settings in a few characters for file names: "4-12-1"."""
        return "-".join(f"{value:g}" for value in self.settings.values())

    def with_steps(self, steps: Sequence[Step], **changes: Any) -> Self:
        """Return this plan with other steps at the same timesteps."""
        return replace(self, steps=tuple(steps), **changes)

    def at(self, timesteps: Sequence[float], process: Process) -> Self:
        """Return this plan for other timesteps: of another resolution, step count or shift of the same solver.

        Each timestep takes the step of the plan's timestep nearest in log-SNR; of two equally near, the noisier one's.
        The plan's own timesteps return the plan itself. Two rules keep valid what a step builds on:

        - A forecast builds on a full-depth step, a held guidance on a step of both branches. If no timestep took that
          step, the first that builds on it runs the original model's step instead.
        - A forecast extrapolates along its last two full-depth steps. If it would reach further than the plan's
          furthest and than `REACH` times their distance in log-SNR, it runs the original model's step instead.

        timesteps: falling. process: the model's process. Figures are left out: they were measured at the plan's steps.

        Raises:
            PlanError: timesteps that do not fall.
        """
        target = replace(self, timesteps=tuple(timesteps), steps=(self.whole,) * len(timesteps), figures={})
        if target.timesteps == self.timesteps:
            return self
        mine, theirs = ([process.log_snr_at(t) for t in plan.timesteps] for plan in (self, target))
        taken = [min(range(self.num_steps), key=lambda k: (abs(mine[k] - there), k)) for there in theirs]
        furthest = max([REACH, *(_reach(self.steps, mine, k, self.num_blocks) for k in range(self.num_steps))])
        steps: list[Step] = []
        # Index in this plan of the last step of each kind that a new step took, and that a step of the plan builds on.
        has = {"full": -1, "both": -1}
        for k, index in enumerate(taken):
            step = self.steps[index]
            needs = _builds_on(self.steps, index, self.num_blocks)
            if any(has[kind] < earlier for kind, earlier in needs.items()) or (
                _reach([*steps, step], theirs, k, self.num_blocks) > furthest * (1 + 1e-6)
            ):
                step = self.whole
            steps.append(step)
            has |= {kind: index for kind, there in _kinds(step, self.num_blocks).items() if there}
        return replace(target, steps=tuple(steps))

    @property
    def whole(self) -> Step:
        """Return the step of the original model under this plan's guidance."""
        return full_step(self.num_blocks, self.cfg_scale)

    def difference(self, other: Self) -> list[tuple[int, Step, Step]]:
        """List the steps that differ: (number, step here, step there). Raises PlanError for other timesteps."""
        if self.timesteps != other.timesteps:
            raise PlanError(f"plans of {self.num_steps} and {other.num_steps} steps have different timesteps")
        both = zip(self.steps, other.steps, strict=True)
        return [(k, here, there) for k, (here, there) in enumerate(both) if here != there]

    def save(self, path: Path) -> None:
        """Write the plan as JSON. An interrupted write leaves no partial file."""
        files.write_json(Path(path), self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return plain data with a checksum. Each step is its text: "12|6", "8|e4", "4+"."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "note"}
        if not self.calls:
            del plain["calls"]
        return seals.sealed({"format": FORMAT, "version": VERSION, **plain, "steps": list(map(str, self.steps))})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan from JSON of this version or of version 1, which has no checksum and says so in `note`.

        Raises:
            PlanError: the file is missing, is not JSON, or is not a plan. Or it was edited: only plans whose router is
                `MANUAL` may be, see `dyndit plan edit`.
        """
        data = files.read_json(Path(path), PlanError)
        if data.get("format") != FORMAT or data.get("version") not in (1, VERSION):
            raise PlanError(f"{path}: expected a {FORMAT} file of version 1 or {VERSION}")
        try:
            if data["version"] == 1:
                return cls(**_of_version_1({k: v for k, v in data.items() if k not in ("format", "version")}))
            if data.get("router") == MANUAL:  # what was predicted or measured was so of another plan
                data |= {"budget": None, "figures": {}}
            plain = data if data.get("router") == MANUAL else seals.unsealed(path, data, PlanError)
            return cls(**{k: v for k, v in plain.items() if k not in ("format", "version", "note", seals.SEAL)})
        except PlanError as error:
            raise error if str(error).startswith(f"{path}: ") else PlanError(f"{path}: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise PlanError(f"{path}: {first_line(error)}") from error

    @property
    def short(self) -> str:
        """Return the plan in a few words: "ramp start 4, ddim, 20 steps, 61% of the blocks"."""
        router = " ".join([self.router, *(f"{name} {value:g}" for name, value in self.settings.items())])
        head = f"{router}, {self.solver}, {self.num_steps} steps, {self.share_of_blocks:.0%} of the blocks"
        return head + (f" ({self.note})" if self.note else "")

    def __repr__(self) -> str:
        return f"DepthPlan({self.short})"

    def _repr_html_(self) -> str:
        """Show the steps in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        """Write a line of timesteps and a line of steps, from the noisiest step to the last."""
        words = [str(step) for step in self.steps]
        width = max(4, *map(len, words))
        lines = [("t", self.timesteps), ("step", words)]
        return "\n".join(
            [self.short, *(f"  {name:>4}  " + " ".join(f"{v!s:>{width}}" for v in row) for name, row in lines)]
        )


def _kinds(step: Step, num_blocks: int) -> dict[str, bool]:
    """Tell what later steps may build on: a full-depth step ("full"), a step of both branches ("both")."""
    return {"full": step.depth == num_blocks, "both": isinstance(step.guide, Unconditional)}


def _builds_on(steps: Sequence[Step], k: int, num_blocks: int) -> dict[str, int]:
    """Return the steps that step k builds on, by kind. A held guidance without an earlier pass builds on none."""
    wanted = {"full": steps[k].forecast, "both": isinstance(steps[k].guide, Held)}
    before = [_kinds(step, num_blocks) for step in steps[:k]]
    found = {
        kind: [i for i, kinds in enumerate(before) if kinds[kind]] for kind, is_wanted in wanted.items() if is_wanted
    }
    return {kind: indices[-1] for kind, indices in found.items() if indices}


def _reach(steps: Sequence[Step], log_snr: Sequence[float], k: int, num_blocks: int) -> float:
    """Return how far step k extrapolates, in distances of its last two full-depth steps; 0 if it does not."""
    full = [i for i, step in enumerate(steps[:k]) if step.depth == num_blocks][-2:]
    if not steps[k].forecast or len(full) < 2:
        return 0.0
    before, last = (log_snr[i] for i in full)
    return (log_snr[k] - last) / max(last - before, 1e-9)


def file_name(solver: str, num_steps: int, budget: float) -> str:
    """Return the usual name of a plan's file: "plan-ddim-20-b0.6.json"."""
    return f"plan-{solver}-{num_steps}-b{budget:g}.json"


def full_step(num_blocks: int, cfg_scale: float) -> Step:
    """Return the step of the original model: both branches unless the guidance scale is 1."""
    return Step.equal(num_blocks, cfg_scale != 1)


_VERSION_1 = frozenset(
    ("timesteps", "cond", "uncond", "num_blocks", "solver", "router", "settings", "cfg_scale", "budget", "trunk")
) | {"exits", "figures"}


def _of_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a version 1 plan. Its depths are whole numbers; negative numbers are codes."""
    if odd := data.keys() - _VERSION_1:
        raise PlanError(f"plan: {min(odd)!r:.40} is no field of version 1")
    cond, uncond = data.pop("cond"), data.pop("uncond")
    if len(cond) != len(uncond):
        raise PlanError(f"plan: {len(cond)} cond depths for {len(uncond)} uncond depths")
    if data.get("cfg_scale", 1.0) == 1:
        uncond = [0] * len(uncond)  # this branch never ran
    data["steps"] = [Step.of_version_1(c, u) for c, u in zip(cond, uncond, strict=True)]
    for ours, theirs in (("backbone", "trunk"), ("exits", "exits")):
        found = data.pop(theirs, "")
        data[ours] = f"{VERSION_1}{found}" if found else ""
    return data | {"note": _UNSEALED if data["backbone"] and data["exits"] else _UNBOUND}


def bind(
    plan: DepthPlan,
    model: DynamicDepth,
    *,
    full: DepthPlan | None = None,
    cfg_scale: float | None = None,
    origin: str = "plan",
    check_identity: bool = True,
) -> DepthPlan:
    """Check that a plan fits a model, and return it. This is the only check of a plan.

    full: the full plan of the requested sampling; the plan must have its solver and timesteps. cfg_scale: the
    requested guidance scale. origin: the file or flag that messages name. check_identity: False accepts a plan of
    another backbone or of other exits.

    Raises:
        PlanError: another depth, backbone, set of exits, solver, guidance scale or timesteps, or a missing exit.
    """
    if plan.note == _UNBOUND and check_identity:
        raise PlanError(
            f"{origin}: {plan.note}; expected a plan that names its model, or `dyndit plan edit` to take it as made by "
            "hand"
        )
    if plan.num_blocks != model.num_blocks:
        raise PlanError(f"{origin}: made for {plan.num_blocks} blocks, but the model has {model.num_blocks}")
    if full is not None and plan.solver != full.solver:
        raise PlanError(f"{origin}: made for solver {plan.solver}, but {full.solver} is asked for")
    if full is not None and plan.timesteps != full.timesteps:
        found = f"{plan.num_steps} steps" if plan.num_steps != full.num_steps else "other timesteps"
        raise PlanError(f"{origin}: made for {found}, but {full.num_steps} steps of {plan.solver} are asked for")
    if full is not None and plan.calls != full.calls:
        raise PlanError(f"{origin}: made for {plan.calls or 'one'} calls a step, but {plan.solver} makes {full.calls}")
    if check_identity:
        model.check_identity(plan.backbone, plan.exits, origin=origin, error=PlanError)
    if missing := sorted({depth for step in plan.steps for depth in step.exits} - set(model.depths)):
        raise PlanError(f"{origin}: depth {missing[0]} has no exit; the model has {list(model.depths)}")
    if cfg_scale not in (None, plan.cfg_scale) and (plan.backbone or 1 in (cfg_scale, plan.cfg_scale)):
        raise PlanError(
            f"{origin}: made for guidance scale {plan.cfg_scale:g}, but --cfg-scale {cfg_scale:g} is asked for"
        )
    return plan


Router = Callable[[DepthPlan, tuple[int, ...]], DepthPlan]
"""Write a plan: (the full plan of a sampling, the model's depths) -> plan.

Example: `functools.partial(ramp, start=4)`.
"""
