"""Fixed schedules: depth as a function of the step alone. Baselines for every calibrated plan, and its starts.

Each takes the full plan (which carries timesteps, solver and guidance) and the depths at which the model can leave;
wanted depths are rounded to the nearest of those.
"""

from dataclasses import replace

from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.process import DDPM, Process


def _scheduled(full: DepthPlan, depths: tuple[int, ...], wanted: list[float], router: str) -> DepthPlan:
    chosen = [min(depths, key=lambda depth: (abs(depth - want), depth)) for want in wanted]
    return full.with_pairs([(d, d if u else 0) for d, u in zip(chosen, full.uncond, strict=True)], router=router)


def constant(full: DepthPlan, depths: tuple[int, ...], depth: float) -> DepthPlan:
    """The same depth at every step."""
    return _scheduled(full, depths, [depth] * full.num_steps, f"constant-{depth:g}")


def ramp(
    full: DepthPlan, depths: tuple[int, ...], start: float, end: float | None = None, power: float = 1.0
) -> DepthPlan:
    """start + (end - start) * u^power, with u from 0 at the noisiest step to 1 at the last; `end` is L by default."""
    end, last = full.num_blocks if end is None else end, max(full.num_steps - 1, 1)
    wanted = [start + (end - start) * (step / last) ** power for step in range(full.num_steps)]
    return _scheduled(full, depths, wanted, f"ramp-{start:g}-{end:g}-p{power:g}")


def switch(full: DepthPlan, depths: tuple[int, ...], depth: float, share: float) -> DepthPlan:
    """`depth` for the first `share` of the steps, then full depth."""
    shallow = round(share * full.num_steps)
    wanted = [depth] * shallow + [full.num_blocks] * (full.num_steps - shallow)
    return _scheduled(full, depths, wanted, f"switch-{depth:g}-{share:g}")


def reversed_plan(plan: DepthPlan) -> DepthPlan:
    """The same depths in the opposite order: deep when noisy. A control, of equal cost by construction."""
    return replace(plan, cond=plan.cond[::-1], uncond=plan.uncond[::-1], router=f"reversed-{plan.router}", figures={})


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
    uncond = tuple(depth if guided else 0 for depth, guided in zip(plan.uncond, inside, strict=True))
    if uncond == plan.uncond:
        return plan
    return replace(plan, uncond=uncond, router=f"{plan.router}-guided-{low:g}-{high:g}", figures={})
