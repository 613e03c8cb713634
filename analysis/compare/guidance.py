"""Sweep the guidance scale at full depth: by the unconditional pass, by an own exit, in an interval of noise levels.

Guidance by an own exit is Internal Guidance (Zhou et al. 2025, arXiv:2512.24176): full depth is pushed away from the
prediction of an intermediate head. The interval is Kynkäänniemi et al. 2024 (arXiv:2404.07724).
"""

from dyndit.analysis.compare.arms import Arm
from dyndit.analysis.compare.context import Context
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.schedules import interval, own_exit
from dyndit.sampling.loop import full_plan


class Guided:
    """Full depth at each scale of the sweep, guided in each of its ways."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`. A point that full depth has already is left to `FullDepth`."""
        sweep = context.experiment.guidance
        return [] if sweep is None else [arm for scale in sweep.scales for arm in self._at(context, scale)]

    def _at(self, context: Context, scale: float) -> list[Arm]:
        experiment, sweep, model = context.experiment, context.experiment.guidance, context.model
        full = full_plan(model, sweep.solver, sweep.steps, scale)
        here = (sweep.solver, sweep.steps)
        there = scale == experiment.cfg_scale and here in experiment.full_depth_points
        arms = [] if there else [self._arm(context, "full", full, "")]
        if scale == 1:
            return arms
        for depth in sweep.exits:
            arms.append(self._arm(context, "own-exit", own_exit(full, model.depths, depth), f"e{depth}"))
        for low, high in sweep.intervals:
            plan = interval(full, model.depths, low, high, model.process)
            arms.append(self._arm(context, "interval", plan, f"{low:g}_{high:g}"))
        return arms

    def _arm(self, context: Context, family: str, plan: DepthPlan, settings: str) -> Arm:
        predicted = context.predicted_ms(plan)
        return Arm(family, bind(plan, context.model), settings=settings, predicted_ms=predicted, swept=True)
