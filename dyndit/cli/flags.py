"""Flags that several verbs share, and what they ask for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from dyndit.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from dyndit.models.dynamic import DynamicDepth
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.step_counts import Goal
    from dyndit.plans.table import ShiftTable

T = TypeVar("T")
Positional = tyro.conf.Positional
Unnamed = Annotated[T, tyro.conf.arg(name="")]
"""A group of flags whose names stand without the group's."""
Json = Annotated[bool, tyro.conf.arg(name="json")]


@dataclass(frozen=True)
class PlanChoice:
    """Which depths to run. Without `--dynamic`, `--plan` or `--budget`: the full model."""

    dynamic: bool = False
    """Run a plan: the given one, or the one for `--budget`."""
    budget: float | None = None
    """Share of full depth's time; the plan is searched on the model's stored table."""
    plan: Path | None = None
    """A plan file."""
    ramp: int | None = None
    """Depth of the first step, of a plan that rises evenly to full depth at the last; needs no calibration."""


@dataclass(frozen=True)
class StepChoice:
    """A time or a quality, in place of a budget at given steps: the step count is chosen with the plan."""

    latency_budget: float | None = None
    """Share of the reference time, above 0 and at most 1, for the least predicted distance."""
    target_fd: float | None = None
    """Predicted Fréchet distance to reach in the least time."""
    reference_steps: int | None = None
    """Steps of full depth whose time is the reference (default: those the table was measured at)."""


FULL_DEPTH = PlanChoice()
AS_GIVEN = StepChoice()


def chosen_plan(
    dynamic: "DynamicDepth", model: str, depth: PlanChoice, solver: str, steps: int, cfg_scale: float
) -> "DepthPlan | None":
    """The plan the flags ask for; None is the full model."""
    from dyndit.calibration.calibrate import plan_on_table
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.schedules import ramp
    from dyndit.sampling.loop import full_plan
    from dyndit.sampling.solvers import timesteps_of

    given = [flag for flag in ("plan", "budget", "ramp") if getattr(depth, flag) is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if depth.ramp is not None:
        if not 1 <= depth.ramp <= dynamic.num_blocks:
            raise InputError(f"--ramp {depth.ramp}: expected 1 to {dynamic.num_blocks}")
        return ramp(full_plan(dynamic, solver, steps, cfg_scale), dynamic.depths, depth.ramp)
    if depth.plan is not None:
        plan = DepthPlan.load(depth.plan)
        bound = (dynamic.trunk_hash(), dynamic.exits_hash()) if plan.trunk else (None, None)
        timesteps = timesteps_of(solver, steps, dynamic.process)
        plan.check(
            depths=dynamic.depths,
            trunk=bound[0],
            exits=bound[1],
            timesteps=timesteps,
            solver=solver,
            origin=str(depth.plan),
        )
        return plan
    if depth.budget is None and not depth.dynamic:
        return None
    budget = 0.6 if depth.budget is None else depth.budget
    return plan_on_table(dynamic, stored_table(model), budget=budget, solver=solver, num_steps=steps)


def stored_table(model: str) -> "ShiftTable":
    """The shift table in a model's folder.

    Raises:
        InputError: there is none.
    """
    from dyndit.plans.table import ShiftTable
    from dyndit.storage import load as checkpoints

    path = Path(model) / checkpoints.TABLE
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the table that `dyndit calibrate {model}` writes")
    return ShiftTable.load(path)


def decoder_of(dynamic: "DynamicDepth", model: str | Path, vae: Path | None, device: str) -> "AutoencoderKL | None":
    """What turns a model's latents into pictures; None where it makes pictures itself.

    Raises:
        InputError: it makes latents, and no autoencoder is given.
    """
    from dyndit.training.latents import load_autoencoder

    if dynamic.pixel_space:
        return None
    if vae is None:
        raise InputError(f"--vae: missing; {model} makes latents, expected the folder of their AutoencoderKL")
    return load_autoencoder(vae).to(device)


def goal_of(choice: StepChoice, steps: int | None, **others: object) -> "Goal | None":
    """What steps are to be chosen for; None where the flags leave them as given. others: flags it excludes."""
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


def print_json(figures: dict[str, object]) -> None:
    """One line, the last that a verb prints."""
    print(json.dumps(figures))
