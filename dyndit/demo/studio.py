"""What the page asks of a model or a pipeline: a plan, a frontier, and both sides of a drawing step by step."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dyndit.demo.planner import Planner
from dyndit.errors import InputError
from dyndit.models.conditions import ClassLabels, Value
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.table import ShiftTable
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start, to_uint8
from dyndit.sampling.sample import check_shape
from dyndit.sampling.solvers import solvers_of

MOST_PICTURES, MOST_STEPS, MOST_SCALE, MOST_SEED, MOST_TEXT = 8, 50, 20.0, 2**31 - 1, 200
"""Bounds of a request: what a visitor may ask of the machine. `MOST_TEXT`: characters of a prompt."""


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.  values: a label or a prompt per picture. budget: share of full depth's time."""

    values: tuple[Value, ...]
    seed: int = 0
    solver: str = "ddim"
    steps: int = 10
    cfg_scale: float = 1.5
    budget: float = 0.5

    def check(self, most_pictures: int = MOST_PICTURES) -> None:
        """Refuse what lies outside the bounds.

        Raises InputError: names the field, what was found and what is expected.
        """
        for name, value, least, most in (
            ("pictures", len(self.values), 1, most_pictures),
            ("seed", self.seed, 0, MOST_SEED),
            ("steps", self.steps, 1, MOST_STEPS),
            ("guidance scale", self.cfg_scale, 0, MOST_SCALE),
        ):
            if not (math.isfinite(value) and least <= value <= most):
                raise InputError(f"{name} {value:g}: expected {least:g} to {most:g}")
        if not 0 < self.budget <= 1:
            raise InputError(f"budget {self.budget:g}: expected above 0 and at most 1")
        if long := [value for value in self.values if isinstance(value, str) and len(value) > MOST_TEXT]:
            raise InputError(f"a prompt of {len(long[0])} characters: expected at most {MOST_TEXT}")


@dataclass(frozen=True)
class Side:
    """One side of the page after `step` steps.

    pictures: uint8 (B, C, H, W), or clips (B, C, T, H, W); None if this state cannot be shown. seconds: of these steps
    together.
    """

    plan: DepthPlan
    step: int
    pictures: Tensor | None
    seconds: float


@dataclass(frozen=True)
class Form:
    """What a visitor fills in.

    first: the values at the start. labels: (name, label) of each class; empty if prompts are asked for. solvers: the
    first one is the usual one. scale: the guidance scale at the start. hint: beside the prompts.
    """

    first: tuple[Value, ...]
    labels: tuple[tuple[str, int], ...]
    solvers: tuple[str, ...]
    guided: bool
    scale: float
    hint: str = ""
    most_pictures: int = MOST_PICTURES


class Studio(ABC):
    """Draws for one visitor at a time, because two drawings at once would falsify each other's times."""

    name: str
    form: Form
    planner: Planner
    about: str = ""
    """A further sentence for the visitor."""
    notes: tuple[str, ...] = ()
    """Lines for who serves the page."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def check(self, request: Request) -> None:
        """Refuse a request outside the bounds. Raises InputError naming the field."""
        request.check(self.form.most_pictures)
        if request.solver not in self.form.solvers:
            raise InputError(f"solver {request.solver[:40]}: expected one of {', '.join(self.form.solvers)}")
        known = {label for _, label in self.form.labels}
        if known and (bad := [value for value in request.values if value not in known]):
            raise InputError(f"class {bad[0]!s:.20}: expected {min(known)} to {max(known)}")

    @abstractmethod
    def full(self, request: Request) -> DepthPlan:
        """Return the plan of full depth. Raises InputError: the request does not fit."""

    @abstractmethod
    def draw(self, request: Request) -> Iterator[tuple[Side, Side | None]]:
        """Yield (full depth, plan) after every step. Both start from the same noise.

        None: the plan's side has not begun.
        """

    def plan(self, request: Request) -> DepthPlan:
        """Return the plan within the request's budget."""
        return self.planner.plan(self.full(request), request.budget)


class ModelStudio(Studio):
    """A model of dyndit's own. Both sides take every step in turn.

    table: the model's shift table. to_pictures: turns the sampler's state into uint8; latents need a decoder. shape:
    (height, width), or (frames, height, width) of clips; () is the model's own. A model without exits gets untrained
    exits, copies of its final layer.

    Raises:
        InputError: the table is of another model, or nothing can be asked of the model without an encoder of prompts.
    """

    def __init__(
        self,
        model: DynamicDepth,
        table: ShiftTable | None = None,
        *,
        name: str = "model",
        to_pictures: Callable[[Tensor], Tensor] = to_uint8,
        shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self._shape = (model.backbone.in_channels, *shape) if shape else None
        check_shape(model, self._shape)
        if table is not None:
            model.check_identity(table.backbone, table.exits, origin=f"{name}: shift table")
        trained = model.exits is not None
        self.model = model if trained else _with_untrained_exits(model)
        self.name, self._to_pictures = name, to_pictures
        self.planner = Planner(self.model.depths, table, trained=trained, lock=self._lock)
        condition, solvers = model.backbone.condition, list(solvers_of(model.process))
        solvers.sort(key=lambda solver: solver != model.process.usual_solver)
        scale = 1.0 if not condition.guided else 1.5 if table is None else table.cfg_scale
        words = getattr(condition, "vocabulary", ())
        self.form = Form(
            first=tuple(condition.plain(condition.in_turn(4))),
            labels=tuple((str(n), n) for n in range(condition.num_classes))
            if isinstance(condition, ClassLabels)
            else (),
            solvers=tuple(solvers),
            guided=condition.guided,
            scale=scale,
            hint=f"Words: {', '.join(words)}" if words else "",
        )

    def full(self, request: Request) -> DepthPlan:
        """See `Studio`."""
        self.check(request)
        self.model.backbone.condition.plain(request.values)
        return full_plan(self.model, request.solver, request.steps, request.cfg_scale)

    def draw(self, request: Request) -> Iterator[tuple[Side, Side | None]]:
        """See `Studio`. A step at full depth runs beforehand, untimed, because a first call costs more."""
        plans = (self.full(request), self.plan(request))
        condition = self.model.backbone.condition.of(request.values, next(self.model.parameters()).device)
        batch = Batch(condition, tuple(range(len(request.values))), request.seed)
        guidance, seconds = Guidance(request.cfg_scale), [0.0, 0.0]
        begin = partial(start, self.model, batch, request.solver, request.steps, shape=self._shape)
        with self._lock:
            warm, *trajectories = (begin() for _ in range(3))
            advance(self.model, batch, warm, plans[0], guidance, stop=1)
            for step in range(request.steps):
                for side, (plan, trajectory) in enumerate(zip(plans, trajectories, strict=True)):
                    spent: list[float] = []
                    hook = lambda _k, whole, _network, spent=spent: spent.append(whole)  # noqa: E731
                    advance(self.model, batch, trajectory, plan, guidance, first=step, stop=step + 1, on_step=hook)
                    seconds[side] += sum(spent)
                pictures = [self._to_pictures(trajectory.x).cpu() for trajectory in trajectories]
                full, dynamic = (
                    Side(*entries) for entries in zip(plans, (step + 1,) * 2, pictures, seconds, strict=True)
                )
                yield full, dynamic


def _with_untrained_exits(model: DynamicDepth) -> DynamicDepth:
    """Return the model with exits that are copies of its final layer."""
    exits = Exits(model.backbone, ExitConfig(head="adaln-linear")).requires_grad_(False).eval()
    made = DynamicDepth(model.backbone, exits, pixel_space=model.pixel_space, process=model.process)
    return made.to(next(model.parameters())).eval()
