"""Flags that several verbs share, and functions that read them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from dyndit import bounds
from dyndit.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from dyndit.models.dynamic import DynamicDepth
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.step_counts import Goal
    from dyndit.plans.table import ShiftTable

T = TypeVar("T")
Positional = tyro.conf.Positional
Unnamed = Annotated[T, tyro.conf.arg(name="")]
"""A group of flags without the group's name before each flag."""
NumHeads = Annotated[int | None, tyro.conf.arg(help="Attention heads of a .pt whose width does not tell them.")]
CfgScale = Annotated[float, tyro.conf.arg(help="Guidance scale; 1 is unguided.")]
BatchSize = Annotated[int, tyro.conf.arg(help="Pictures at a time.")]
Device = Annotated[str, tyro.conf.arg(help="auto, cpu or cuda; auto is a GPU if there is one.")]
_OWN = "own is the weights'; auto is bfloat16 on a GPU that computes in it, else own"
Dtype = Annotated[str, tyro.conf.arg(help=f"Precision to compute in: auto, own, float32, bfloat16 or float16. {_OWN}.")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="End with one line of JSON.")]


@dataclass(frozen=True)
class PlanChoice:
    """Choose the depths to run. Without `--dynamic`, `--plan`, `--budget` or `--router`: the full model.

    Args:
        dynamic: Run a plan: the given plan, or a plan for `--budget` (default: 0.6).
        budget: Share of full depth's time. The plan is searched on the model's stored table.
        plan: A plan file.
        router: A router that needs no calibration, with its settings: "ramp:3" rises evenly from depth 3 to full depth.
            One of {routers}.
    """

    dynamic: bool = False
    budget: float | None = None
    plan: Path | None = None
    router: str | None = None


@dataclass(frozen=True)
class StepChoice:
    """Choose the step count with the plan, for a time or a quality, in place of a budget at given steps."""

    latency_budget: float | None = None
    """Share of the reference time, above 0 and at most 1. Find the least predicted distance in it."""
    target_fd: float | None = None
    """Predicted Fréchet distance. Reach it in the least time."""
    reference_steps: int | None = None
    """Steps of full depth whose time is the reference (default: the steps that the table was measured at)."""


def checked(verb: Callable[..., None]) -> Callable[..., None]:
    """Check a verb's flags before it runs: numbers by `dyndit.bounds`, and that its inputs are there.

    No library is loaded for that, so a wrong path is refused at once.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        values: dict[str, object] = {}
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            values |= vars(value) if is_dataclass(value) else {name: value}
        bounds.check(**values)
        bounds.check_inputs(values)
        if values.get("recipe") is not None:
            from dyndit.cli.recipes import check_name

            check_name(str(values["recipe"]))
        for name in ("model", "source"):
            _check_model(values.get(name))
        verb(*args, **kwargs)

    return run


def _check_model(model: object) -> None:
    """Refuse a model that is no path, no name and no hub id."""
    from dyndit.storage.hub_id import parse

    if isinstance(model, Path):
        if not model.is_dir():
            raise InputError(
                f"{model}: the table is written into the model's folder; expected a local model folder, which "
                "`dyndit distill` or `dyndit convert` makes"
            )
        return
    is_name = not model or model == "digits" or str(model).startswith("random:")
    if not (is_name or Path(str(model)).exists() or parse(str(model))):
        raise CheckpointError(
            f"{model}: no such file or folder; expected a model folder, a DiT .pt, 'digits' or a hub id (org/name)"
        )


FULL_DEPTH = PlanChoice()
AS_GIVEN = StepChoice()


def chosen_plan(
    dynamic: "DynamicDepth", model: str, depth: PlanChoice, solver: str, steps: int, cfg_scale: float
) -> "DepthPlan | None":
    """Return the plan that the flags ask for, not yet bound to the model. None is the full model."""
    from dyndit.calibration.calibrate import plan_on_table
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.schedules import parse_router
    from dyndit.sampling.loop import full_plan

    given = [flag for flag in ("plan", "budget", "router") if getattr(depth, flag) is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if depth.router is not None:
        return parse_router(depth.router)(full_plan(dynamic, solver, steps, cfg_scale), dynamic.depths)
    if depth.plan is not None:
        return DepthPlan.load(depth.plan)
    if depth.budget is None and not depth.dynamic:
        return None
    budget = 0.6 if depth.budget is None else depth.budget
    return plan_on_table(dynamic, stored_table(model), budget=budget, solver=solver, num_steps=steps)


def stored_table(model: str) -> "ShiftTable":
    """Load the shift table in a model's folder. Raises InputError: there is no table."""
    from dyndit.plans.table import ShiftTable
    from dyndit.storage import load as checkpoints

    path = Path(model) / checkpoints.TABLE
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the table that `dyndit calibrate {model}` writes")
    return ShiftTable.load(path)


def decoder_of(dynamic: "DynamicDepth", model: str | Path, vae: Path | None, device: str) -> "AutoencoderKL | None":
    """Load the autoencoder of a model's latents. A model of pictures gives None.

    Raises InputError: the model makes latents, and no autoencoder is given.
    """
    from dyndit.training.latents import load_autoencoder

    if dynamic.pixel_space:
        return None
    if vae is None:
        raise InputError(f"--vae: missing; {model} makes latents, expected the folder of their AutoencoderKL")
    return load_autoencoder(vae).to(device)


def goal_of(choice: StepChoice, steps: int | None, **others: object) -> "Goal | None":
    """Return the goal to choose steps for. None: the steps are given. others: flags that exclude a goal."""
    from dyndit.plans.step_counts import LatencyBudget, TargetFD

    wanted = {"latency-budget": choice.latency_budget, "target-fd": choice.target_fd}
    asked = [flag for flag, value in wanted.items() if value is not None]
    given = [flag for flag, value in (wanted | others).items() if value is not None]
    if not asked:
        if choice.reference_steps is not None:
            raise InputError(
                f"--reference-steps {choice.reference_steps}: expected --latency-budget or --target-fd with it"
            )
        return None
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if steps is not None:
        raise InputError(f"--steps {steps}: --{asked[0]} chooses the step count; expected one of them")
    if choice.target_fd is not None:
        return TargetFD(choice.target_fd, choice.reference_steps)
    return LatencyBudget(choice.latency_budget, choice.reference_steps)
