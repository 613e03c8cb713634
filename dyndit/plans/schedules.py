"""Fixed schedules: routers whose depth depends on the step alone. They are baselines and starts of calibrated plans.

Each schedule takes the full plan, with its timesteps, solver and guidance, and the model's depths. Wanted depths are
rounded to the nearest depth of the model.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dyndit.errors import InputError, expected_one_of
from dyndit.plans.plan import DepthPlan, Router
from dyndit.plans.step import Held, NoGuide, OwnExit, Step, Unconditional
from dyndit.process import DDPM, Process

F = TypeVar("F", bound=Callable[..., DepthPlan])

ROUTERS: dict[str, Callable[..., DepthPlan]] = {}
"""Routers that need no calibration, by name: (full plan, depths, settings...) -> plan."""


def router(function: F) -> F:
    """Register a router under its function's name, for `--router NAME:SETTINGS`."""
    ROUTERS[function.__name__] = function
    return function


def parse_router(text: str, process: Process = DDPM()) -> Router:
    """Read a router such as "ramp:3" or "ramp:3,12,1.5". Settings follow the order of the function's arguments.

    process: the model's process, for routers that ask for noise levels. Raises InputError for an unknown
    router, or for settings that the router does not take.
    """
    name, _, rest = text.partition(":")
    if name not in ROUTERS:
        raise InputError(f"--router {text}: {expected_one_of(name, ROUTERS)} (with its settings: ramp:3)")
    try:
        settings = [float(value) for value in rest.split(",") if value]
        _settings_of(ROUTERS[name]).bind(*settings)
    except (ValueError, TypeError) as error:
        wanted = ", ".join(_settings_of(ROUTERS[name]).parameters)
        raise InputError(f"--router {text}: expected {name}: and numbers for {wanted} ({error})") from error
    more = {"process": process} if "process" in inspect.signature(ROUTERS[name]).parameters else {}
    return lambda full, depths: ROUTERS[name](full, depths, *settings, **more)


def _settings_of(router: Callable[..., DepthPlan]) -> inspect.Signature:
    """Return the signature of a router's settings: without plan, depths and process."""
    given = list(inspect.signature(router).parameters.values())[2:]
    return inspect.Signature([parameter for parameter in given if parameter.name != "process"])


def _scheduled(
    full: DepthPlan, depths: tuple[int, ...], wanted: list[float], router: str, **settings: float
) -> DepthPlan:
    chosen = [min(depths, key=lambda depth: (abs(depth - want), depth)) for want in wanted]
    guided = [isinstance(step.guide, Unconditional) for step in full.steps]
    return full.with_steps(list(map(Step.equal, chosen, guided)), router=router, settings=settings)


@router
def constant(full: DepthPlan, depths: tuple[int, ...], depth: float) -> DepthPlan:
    """Run the same depth at every step."""
    return _scheduled(full, depths, [depth] * full.num_steps, "constant", depth=depth)


@router
def ramp(
    full: DepthPlan, depths: tuple[int, ...], start: float, end: float | None = None, power: float = 1.0
) -> DepthPlan:
    """Rise from depth `start` at the first step to `end` at the last. It needs no calibration.

        plan = functools.partial(dyndit.ramp, start=4)
        drawn = dyndit.sample(model, labels=[3, 7], plan=plan)

    full: the full plan, which the sampler hands over. depths: the model's depths; wanted depths are rounded to them.
    start: the first step's depth. end: the last step's depth; None: L. power: step k of K wants depth
    start + (end - start) * (k / (K - 1))^power. -> the plan.
    """
    end, last = full.num_blocks if end is None else end, max(full.num_steps - 1, 1)
    wanted = [start + (end - start) * (step / last) ** power for step in range(full.num_steps)]
    return _scheduled(full, depths, wanted, "ramp", start=start, end=end, power=power)


@router
def switch(full: DepthPlan, depths: tuple[int, ...], depth: float, share: float) -> DepthPlan:
    """Run `depth` for the first `share` of the steps, then full depth."""
    shallow = round(share * full.num_steps)
    wanted = [depth] * shallow + [full.num_blocks] * (full.num_steps - shallow)
    return _scheduled(full, depths, wanted, "switch", depth=depth, share=share)


@router
def skips(
    full: DepthPlan, depths: tuple[int, ...], start: float = 1, end: float | None = None, every: float = 2
) -> DepthPlan:
    """Run full depth every few steps, and between them skip the last blocks, with a forecast of what they would add.

    It needs no training: exits that are copies of the model's own final layer serve, because blocks are residual. The
    first two steps and the last are at full depth; a skipping step runs depth start + (end - start) * u, with u as in
    `ramp` (default end: half of L), and holds the guidance of the last full step.

    every: steps from one full step to the next.

    Raises:
        InputError: `every` is below 2.
    """
    if every < 2:
        raise InputError(f"--router skips: every {every:g}; expected at least 2 steps from one full step to the next")
    end, last = full.num_blocks / 2 if end is None else end, max(full.num_steps - 1, 1)
    shallow = [depth for depth in depths if depth < full.num_blocks]
    steps, since = [], 0
    for k, whole in enumerate(full.steps):
        since = 0 if k < 2 or k == last or since + 1 >= every or not shallow else since + 1
        wanted = start + (end - start) * k / last
        guide = Held() if isinstance(whole.guide, Unconditional) else NoGuide()
        nearest = min(shallow, key=lambda depth: (abs(depth - wanted), depth), default=full.num_blocks)
        steps.append(Step(nearest, guide, forecast=True) if since else whole)
    return full.with_steps(steps, router="skips", settings={"start": start, "end": end, "every": every})


@router
def own_exit(full: DepthPlan, depths: tuple[int, ...], depth: float) -> DepthPlan:
    """Guide full depth by its own exit at `depth` at every guided step, in place of the unconditional pass.

    Internal Guidance (Zhou et al. 2025, arXiv:2512.24176) is this, with an intermediate head trained beside the model.
    """
    chosen = min(depths[:-1], key=lambda each: (abs(each - depth), each), default=None)
    if chosen is None:
        raise InputError(f"--router own_exit:{depth:g}: the model has no exits; expected a model with exits")
    steps = [replace(s, guide=OwnExit(chosen)) if isinstance(s.guide, Unconditional) else s for s in full.steps]
    return full.with_steps(steps, router="own_exit", settings={"depth": chosen})


@router
def interval(full: DepthPlan, depths: tuple[int, ...], low: float, high: float, process: Process = DDPM()) -> DepthPlan:
    """Run full depth, and guide it at noise levels in (low, high] alone (`guidance_interval`)."""
    return replace(guidance_interval(full, low, high, process), router="interval")


def reversed_plan(plan: DepthPlan) -> DepthPlan:
    """Reverse the order of the steps: deep when noisy. This control has the same cost by construction."""
    return plan.with_steps(plan.steps[::-1], router="reversed", figures={})


def guidance_interval(plan: DepthPlan, low: float, high: float, process: Process = DDPM()) -> DepthPlan:
    """Limit the plan's guidance to noise levels in (low, high], without an unconditional pass outside.

    As in Kynkäänniemi et al. 2024 (arXiv:2404.07724), a noise level is the noise's standard deviation at picture scale
    1 (`Process.noise_level`). With DDPM it is 157 at t = 999, 17 at 750, 3.4 at 500, 0.96 at 250, 0.01 at 0.
    process: the model's process. Raises InputError unless 0 <= low < high.
    """
    if not 0 <= low < high:
        raise InputError(f"guidance interval ({low:g}, {high:g}): expected noise levels 0 <= low < high")
    inside = [low < process.noise_level(t) <= high for t in plan.timesteps]
    steps = [step if guided else step.unguided() for step, guided in zip(plan.steps, inside, strict=True)]
    if tuple(steps) == plan.steps:
        return plan
    limits = {
        "guided_above": low,
        **({"guided_to": high} if math.isfinite(high) else {}),
    }  # a plan's numbers are finite
    return plan.with_steps(steps, settings=plan.settings | limits, figures={})
