"""Make the arms: full depth, guidance, searched plans and controls, chosen step counts, peers, variants, confidence.

To add a kind of arm, write a class with one method and add it to `SOURCES`.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import pandas as pd

from dyndit import sealed_csv
from dyndit.analysis.compare.arms import Arm, Source
from dyndit.analysis.compare.context import Context, model_with_exits, scaled
from dyndit.analysis.compare.evolved import Evolved
from dyndit.analysis.compare.experiment import Variant
from dyndit.analysis.compare.guidance import Guided
from dyndit.analysis.compare.peers import PeerContext
from dyndit.analysis.compare.peers.confidence import ConfidentDepth, measure_decisions, record_signals
from dyndit.analysis.compare.peers.random_plan import shuffled
from dyndit.analysis.compare.tuned import Tuned
from dyndit.analysis.metrics.extractors.joined import join
from dyndit.analysis.metrics.features import Measured
from dyndit.calibration.extractor import SEPARATOR
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.predictor import Predictor
from dyndit.plans.schedules import constant, ramp, reversed_plan
from dyndit.plans.step_counts import LatencyBudget
from dyndit.plans.table import ShiftTable
from dyndit.progress import progress_bar
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import unguided
from dyndit.sampling.solvers import timesteps_of


class FullDepth:
    """Full depth at every step count, with guidance and without guidance."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        experiment = context.experiment
        plans = [context.full(*point) for point in experiment.full_depth_points]
        points = experiment.unguided_points or product(experiment.solvers, experiment.unguided_steps)
        plans += [replace(unguided(context.full(*point)), router="unguided") for point in points]
        return [Arm(plan.router, plan, predicted_ms=context.predicted_ms(plan)) for plan in plans]


class Searched:
    """Plans searched at every point and budget, and their controls."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        experiment, controls = context.experiment, context.experiment.controls
        within = _budgets_within(context) or experiment.budgets  # if none is met, the search refuses them
        budgets = {point: list(within) for point in experiment.dynamic_points}
        shares = {} if controls is None else self._control_budgets(context)
        if controls is not None:
            budgets.setdefault((controls.solver, controls.steps), []).extend(shares.values())
        searched, arms = {}, []
        with progress_bar("searching plans", context.console, unit="points") as advance:
            advance(0, len(budgets))
            for done, (point, wanted) in enumerate(budgets.items()):
                for budget, plan, file in context.searched(*point, wanted):
                    searched[point, budget] = plan
                    arms.append(_searched_arm(context, "searched", budget, plan, file))
                    arms += _shuffled(context, budget, plan)
                advance(done + 1, len(budgets))
        for depth, budget in shares.items():
            plan = searched[(controls.solver, controls.steps), budget]
            arms += self._controls(context, depth, budget, plan)
        return arms

    def _control_depths(self, context: Context) -> tuple[int, ...]:
        plain = {choice.depth for choice in context.table.choices if not choice.forecast}
        return tuple(sorted(plain | {context.model.num_blocks}))

    def _control_budgets(self, context: Context) -> dict[int, float]:
        """Map each control's constant depth to its share of full depth's time."""
        controls, depths = context.experiment.controls, self._control_depths(context)
        full, cost = context.full(controls.solver, controls.steps), context.table.cost
        return {d: round(cost.share_of_time(constant(full, depths, d)), 3) for d in controls.depths}

    def _controls(self, context: Context, depth: int, budget: float, searched: DepthPlan) -> list[Arm]:
        """Return the constant plan, the searched plan reversed and shuffled, and the ramps closest to the budget."""
        controls, depths = context.experiment.controls, self._control_depths(context)
        full = context.full(controls.solver, controls.steps)
        predictor = Predictor(context.table, full.timesteps, context.base(controls.solver, controls.steps), full.calls)
        plans = [constant(full, depths, depth), reversed_plan(searched)]
        plans += [shuffled(searched, seed) for seed in range(controls.num_shuffled)]
        plans += _ramps_within(context, full, depths, budget)

        def arm(plan: DepthPlan) -> Arm:
            predicted = {"predicted_fd": predictor.predict(plan), "predicted_ms": context.predicted_ms(plan)}
            return Arm(plan.router, plan, budget, plan.settings_text, **predicted)

        return list(map(arm, plans))


class Chosen:
    """Plans with a chosen step count, for a share of full depth's time at the reference steps."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`. The table's file keeps full depth's moments at the step counts."""
        experiment, arms = context.experiment, []
        for solver, share in product(experiment.solvers, experiment.latency_budgets):
            name = f"plan-chosen-{solver}-b{share:g}.json"
            if (context.out / name).exists():
                plan = context.read_plan(name)
            else:
                goal = LatencyBudget(share, experiment.latency_reference_steps)
                timesteps = partial(timesteps_of, solver, process=context.model.process)
                plan = goal.choose(context.with_bases(solver), solver, timesteps)
                plan.save(context.out / name)
            arms.append(_searched_arm(context, "chosen", share, plan, name))
        return arms


class Peers:
    """The alternatives to dynamic depth. A peer's trained weights are kept in `out/peers` and reused."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        experiment, arms = context.experiment, []
        for_peers = PeerContext(context.out / "peers", context.data, experiment.peer_budget, experiment.train)
        for peer in experiment.peers:
            model = peer.model(context.model, for_peers).eval()
            for solver, steps in experiment.peer_points:
                plan = peer.plan(full_plan(model, solver, steps, experiment.cfg_scale), model.depths)
                bind(plan, model)
                predicted = context.predicted_ms(plan) if model is context.model else None
                arms.append(Arm(peer.name, plan, None, peer.label, model=model, peer=peer, predicted_ms=predicted))
        return arms


class Variants:
    """Plans made with other settings. Each variant keeps its exits, table and plans in `out/variants`."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        tables: dict[str, ShiftTable] = {}  # by the extractors that they were measured by
        return [arm for variant in context.experiment.variants for arm in self._of(context, variant, tables)]

    def _of(self, context: Context, variant: Variant, tables: dict[str, ShiftTable]) -> list[Arm]:
        """Return a variant's searched plans; with another backbone, also full depth of that backbone."""
        folder, model = context.out / "variants" / variant.name, context.model
        given = context.backbone if variant.train is None else None
        own = replace(context, experiment=variant.applied(context.experiment), out=folder, given=given, known=None)
        if variant.distill is not None or given is None:
            model = model_with_exits(own.experiment, given, own.data, folder, context.console)
            own = replace(own, model=model.to(context.model.device))
        else:
            own = replace(own, known=context.table)
        if variant.extractor is not None:
            known = tables.get(variant.extractor) if variant.distill is None else None
            own = replace(own, references=(_joined(context, variant), *context.references[1:]), known=known)
        within, family = _budgets_within(own, f"variant {variant.name}: "), f"searched-{variant.name}"
        arms: list[Arm] = []
        for solver, steps in own.experiment.dynamic_points:
            if own.model.identity.backbone != context.model.identity.backbone:
                full = own.full(solver, steps)
                arms.append(Arm(f"full-{variant.name}", full, predicted_ms=own.predicted_ms(full)))
            arms += [_searched_arm(own, family, *found) for found in own.searched(solver, steps, within)]
        if variant.extractor is not None and variant.distill is None:
            tables.setdefault(variant.extractor, own.table)
        if variant.extractor is not None:
            arms = [replace(arm, predicted_fd=None) for arm in arms]  # of other features than the rows'
        return [replace(arm, model=own.model, variant=variant.name) for arm in arms]


class Calibrations:
    """The searched plans of more calibrations. Each keeps its exits, table and plans in `out/calibrations`."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        return [arm for k in range(1, context.experiment.num_calibrations) for arm in self._of(context, k)]

    def _of(self, context: Context, number: int) -> list[Arm]:
        name = f"calibrations/{number}"
        folder, experiment = context.out / name, context.experiment.calibrated(number)
        context.console.print(f"calibration {number + 1} of {experiment.num_calibrations}")
        model = model_with_exits(experiment, context.backbone, context.data, folder, context.console)
        changes = {"experiment": experiment, "out": folder, "calibration": number, "given": context.backbone}
        own = replace(context, model=model.to(context.model.device), known=None, **changes)
        arms = [arm for source in (Searched(), Chosen()) for arm in source.arms(own)]
        return [
            replace(arm, model=own.model, plan_file=f"{name}/{arm.plan_file}" * bool(arm.plan_file)) for arm in arms
        ]


class Confidence:
    """The confidence router. Its thresholds and its decisions at every step are written to `out`."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        experiment, settings = context.experiment, context.experiment.confidence
        arms: list[Arm] = []
        if settings is None:
            return arms
        context.console.print("calibrating the confidence router")
        point = {"solver": experiment.calibration_solver, "num_steps": experiment.calibration_steps}
        signals = record_signals(context.model, cfg_scale=experiment.cfg_scale, settings=settings, **point)
        for target in settings.targets:
            thresholds = signals.thresholds(target, settings.num_bands)
            thresholds.save(context.out / f"thresholds-e{target:g}.json")
            model = ConfidentDepth(context.model, thresholds)
            for point in experiment.dynamic_points:
                plan = replace(context.full(*point), router="confidence")
                decided = measure_decisions(model, plan, num_pictures=settings.num_pictures, seed=settings.seed + 1)
                arms.append(Arm("confidence", plan, None, f"e{target:g}", model=model, decided=decided))
        if arms:
            frames = [arm.decided.frame().assign(arm=arm.name) for arm in arms]
            sealed_csv.write(context.out / "confidence.csv", pd.concat(frames))
        return arms


SOURCES: tuple[Source, ...] = (
    *(FullDepth(), Guided(), Searched(), Chosen(), Peers(), Tuned(), Evolved(), Variants(), Calibrations()),
    Confidence(),
)
"""Every source, in the order that makes the arms."""


def _joined(context: Context, variant: Variant) -> Measured:
    """Join the comparison's extractors that a variant is calibrated by."""
    there = {real.extractor.name: real for real in context.references}
    parts = [there[name] for name in (variant.extractor or "").split(SEPARATOR)]
    return scaled(Measured(parts[0].given, join([part.extractor for part in parts])))


def _budgets_within(context: Context, whose: str = "") -> list[float]:
    """Return the budgets that a plan meets, and print the others."""
    if beyond := sorted(set(context.experiment.budgets) - set(context.within)):
        least = f"the cheapest plan takes {context.table.least_share:.2f}"
        context.console.print(f"{whose}no plan within {', '.join(map(str, beyond))}: {least}")
    return context.within


def _searched_arm(context: Context, family: str, budget: float, plan: DepthPlan, file: str) -> Arm:
    predicted = {"predicted_fd": plan.figures["predicted_fd"], "predicted_ms": context.predicted_ms(plan)}
    return Arm(family, plan, budget, plan_file=file, calibration=context.calibration, **predicted)


def _shuffled(context: Context, budget: float, searched: DepthPlan) -> list[Arm]:
    """Return a searched plan's steps in other orders, one for each of the experiment's seeds."""
    plans = {seed: shuffled(searched, seed) for seed in context.experiment.shuffle_seeds}
    made = {"predicted_ms": context.predicted_ms(searched), "calibration": context.calibration}
    return [Arm("shuffled", plan, budget, f"seed{seed}", **made) for seed, plan in plans.items()]


def _ramps_within(context: Context, full: DepthPlan, depths: tuple[int, ...], budget: float) -> list[DepthPlan]:
    """Return the distinct ramps with the longest predicted time within the budget."""
    family: dict[tuple, DepthPlan] = {}
    for low, high, power in product(depths, depths, (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)):
        if low < high:
            plan = ramp(full, depths, low, high, power)
            family.setdefault(plan.steps, plan)
    cost = context.table.cost
    within = [plan for plan in family.values() if cost.share_of_time(plan) <= budget * (1 + 1e-9)]
    return sorted(within, key=cost.share_of_time, reverse=True)[: context.experiment.controls.num_ramps]
