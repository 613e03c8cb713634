"""Fixed schedules: routers whose depth is a function of the step alone. Baselines for every calibrated plan, and its
starts.

Each takes the full plan (which carries timesteps, solver and guidance) and the depths at which the model can leave;
wanted depths are rounded to the nearest of those.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan, Router
from dyndit.plans.step import NoGuide, Step, Unconditional
from dyndit.process import DDPM, Process

F = TypeVar("F", bound=Callable[..., DepthPlan])

ROUTERS: dict[str, Callable[..., DepthPlan]] = {}
"""Routers that need no calibration, by name: (full plan, depths, settings...) -> plan."""


def router(function: F) -> F:
    """Register a router under its function's name; the command line takes it as `--router NAME:SETTINGS`."""
    ROUTERS[function.__name__] = function
    return function


def parse_router(text: str) -> Router:
    """The router of a text: "ramp:3" or "ramp:3,12,1.5", the settings in the order of the function's arguments.

    Raises:
        InputError: an unknown router, or settings it does not take.
    """
    name, _, rest = text.partition(":")
    if name not in ROUTERS:
        raise InputError(f"--router {text}: expected one of {', '.join(ROUTERS)}, with its settings (ramp:3)")
    try:
        settings = [float(value) for value in rest.split(",") if value]
        inspect.signature(ROUTERS[name]).bind(None, None, *settings)
    except (ValueError, TypeError) as error:
        wanted = ", ".join(list(inspect.signature(ROUTERS[name]).parameters)[2:])
        raise InputError(f"--router {text}: expected {name}: and numbers for {wanted} ({error})") from error
    return lambda full, depths: ROUTERS[name](full, depths, *settings)


def _scheduled(
    full: DepthPlan, depths: tuple[int, ...], wanted: list[float], router: str, **settings: float
) -> DepthPlan:
    chosen = [min(depths, key=lambda depth: (abs(depth - want), depth)) for want in wanted]
    guided = [isinstance(step.guide, Unconditional) for step in full.steps]
    return full.with_steps(list(map(Step.equal, chosen, guided)), router=router, settings=settings)


@router
def constant(full: DepthPlan, depths: tuple[int, ...], depth: float) -> DepthPlan:
    """The same depth at every step."""
    return _scheduled(full, depths, [depth] * full.num_steps, "constant", depth=depth)


@router
def ramp(
    full: DepthPlan, depths: tuple[int, ...], start: float, end: float | None = None, power: float = 1.0
) -> DepthPlan:
    """start + (end - start) * u^power, with u from 0 at the noisiest step to 1 at the last; `end` is L by default."""
    end, last = full.num_blocks if end is None else end, max(full.num_steps - 1, 1)
    wanted = [start + (end - start) * (step / last) ** power for step in range(full.num_steps)]
    return _scheduled(full, depths, wanted, "ramp", start=start, end=end, power=power)


@router
def switch(full: DepthPlan, depths: tuple[int, ...], depth: float, share: float) -> DepthPlan:
    """`depth` for the first `share` of the steps, then full depth."""
    shallow = round(share * full.num_steps)
    wanted = [depth] * shallow + [full.num_blocks] * (full.num_steps - shallow)
    return _scheduled(full, depths, wanted, "switch", depth=depth, share=share)


def reversed_plan(plan: DepthPlan) -> DepthPlan:
    """The same depths in the opposite order: deep when noisy. A control, of equal cost by construction."""
    return plan.with_steps(plan.steps[::-1], router="reversed", figures={})


def guidance_interval(plan: DepthPlan, low: float, high: float, process: Process = DDPM()) -> DepthPlan:
    """The plan with guidance at noise levels in (low, high] alone: no unconditional pass outside.

    Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models" (arXiv:2404.07724). As there, a noise level is the noise's standard deviation where the picture's
    scale is 1 (`Process.noise_level`): with DDPM it is 157 at t = 999, 17 at 750, 3.4 at 500, 0.96 at 250, 0.01 at 0.

    process: the model's.

    Raises:
        InputError: not 0 <= low < high.
    """
    if not 0 <= low < high:
        raise InputError(f"guidance interval ({low:g}, {high:g}): expected noise levels 0 <= low < high")
    inside = [low < process.noise_level(t) <= high for t in plan.timesteps]
    steps = [
        step if guided else replace(step, guide=NoGuide()) for step, guided in zip(plan.steps, inside, strict=True)
    ]
    if tuple(steps) == plan.steps:
        return plan
    return plan.with_steps(steps, settings=plan.settings | {"guided_above": low, "guided_to": high}, figures={})
