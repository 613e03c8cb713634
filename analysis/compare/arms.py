"""What a comparison measures, made ready: exits, the shift table, plans, peers, variants, routers.

Every stage leaves its result on disk; what is there and valid is not made again.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
from rich.console import Console

from dyndit.analysis.compare.experiment import Experiment, Variant
from dyndit.analysis.compare.peers import PeerSettings, Workshop
from dyndit.analysis.compare.peers.confidence import ConfidentDepth, Decisions, measure_decisions, record_signals
from dyndit.analysis.compare.peers.random_plan import shuffled
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.fidelity import Moments
from dyndit.calibration.calibrate import measure_bases, measure_moments
from dyndit.calibration.drawing import NativeDrawing
from dyndit.calibration.measure import measure_shifts, part_of
from dyndit.errors import CheckpointError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.refined import refined
from dyndit.plans.schedules import constant, ramp, reversed_plan
from dyndit.plans.search import search
from dyndit.plans.step_counts import LatencyBudget
from dyndit.plans.table import ShiftTable
from dyndit.progress import progress_bar
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import unguided
from dyndit.storage import load as checkpoints
from dyndit.training.data import Pictures
from dyndit.training.exit_errors import exit_error_table


@dataclass(frozen=True)
class Arm:
    """One thing that is measured: a model under a plan.

    model: None for the comparison's own. peer: whose arm it is, where it is a peer's. predicted_ms: per picture, by the
    table's cost model, where the plan says what runs. decided: what the pictures decided by themselves, where they do.
    """

    name: str
    family: str
    plan: DepthPlan
    budget: float | None = None
    predicted_fd: float | None = None
    predicted_ms: float | None = None
    model: DynamicDepth | None = None
    peer: PeerSettings | None = None
    decided: Decisions | None = None


def plan_file(out: Path, arm: Arm) -> Path:
    """Where the plan of a searched or chosen arm lies."""
    return out / f"plan-{arm.name.removeprefix('searched-')}.json"


def model_with_exits(
    experiment: Experiment,
    trunk: DynamicDepth | None,
    data: Pictures,
    out: Path,
    console: Console,
) -> DynamicDepth:
    """The trunk with its exits, from `out/model` where they are there and whole.

    No trunk: it is trained. A trunk that comes with exits keeps them.
    """
    folder = out / "model"
    if (folder / checkpoints.EXITS).exists():
        console.print(f"trunk and exits: there already ({folder})")
        return checkpoints.load(folder)
    if trunk is None:
        console.print("training the trunk")
        trunk, _ = experiment.train.run(data, out / "training")
    model = trunk
    if trunk.exits is None:
        console.print("distilling exits")
        model, _ = experiment.distill.run(trunk, data, out / "distillation")
    exit_error_table(model, data).to_csv(out / "exit-errors.csv", index=False)
    checkpoints.save(model, folder)
    return model


@dataclass(frozen=True)
class Preparation:
    """The stages between the exits and the first picture that counts, and what they all need."""

    experiment: Experiment
    model: DynamicDepth
    judges: tuple[Measured, ...]
    """Real pictures as each extractor sees them; plans are searched for the first."""
    out: Path
    console: Console
    trunk: DynamicDepth | None = None
    """The model as it was given, before its exits and maybe its trunk were trained; None: `model`."""

    @property
    def extractor(self) -> Extractor:
        """What plans are calibrated on."""
        return self.judges[0].extractor

    def table(self, known: ShiftTable | None = None) -> ShiftTable:
        """The shift table, from beside the model where it is there and this model's.

        known: another table; where it holds all that this one would, nothing is measured.
        """
        path, experiment = self.out / "model" / checkpoints.TABLE, self.experiment
        if path.exists():
            try:
                table = ShiftTable.load(path)
            except CheckpointError as error:
                self.console.print(f"{error}: measured again")
            else:
                if (table.trunk, table.exits) != (self.model.trunk_hash(), self.model.exits_hash()):
                    self.console.print(f"{path}: of another model; measured again")
                elif table.extractor_fingerprint != self.extractor.fingerprint:
                    # One that came with the model: a search on it would be for a judge that nobody asked for.
                    name, of = self.extractor.name, table.extractor
                    theirs = of if of != name else f"other weights of {of}"
                    self.console.print(f"{path}: of {theirs}, not this comparison's {name}; measured again")
                else:
                    self.console.print(f"shift table: there already ({path})")
                    return table
        settings, solver, steps = experiment.calibration, experiment.calibration_solver, experiment.calibration_steps
        cfg_scale = experiment.calibration_cfg_scale or experiment.cfg_scale
        if known is not None:
            drawing = NativeDrawing(self.model, solver, steps, cfg_scale, seed=settings.seed)
            if part := part_of(known, drawing, settings):
                return part
        with progress_bar("measuring distribution shifts", self.console) as advance:
            return measure_shifts(
                self.model,
                self.extractor,
                self.judges[0].moments(),
                solver=solver,
                num_steps=steps,
                cfg_scale=cfg_scale,
                settings=settings,
                into=path,
                on_progress=advance,
            )

    def arms(self, table: ShiftTable) -> list[Arm]:
        """Every arm of the comparison; searched plans are written to `out`, and read back where they are there."""
        experiment, controls = self.experiment, self.experiment.controls
        arms = [
            Arm(f"full-{solver}-{steps}", "full", self._full(solver, steps))
            for solver, steps in experiment.full_points
            or product((*experiment.solvers, *experiment.full_solvers), experiment.full_steps)
        ]
        arms += [
            Arm(
                f"unguided-{solver}-{steps}",
                "unguided",
                replace(unguided(self._full(solver, steps)), router="unguided"),
            )
            for solver, steps in experiment.unguided_points or product(experiment.solvers, experiment.unguided_steps)
        ]
        budgets = {point: list(experiment.budgets) for point in experiment.dynamic_points}
        shares = self._control_budgets(table)
        if controls is not None:
            budgets.setdefault((controls.solver, controls.steps), []).extend(shares.values())
        searched: list[Arm] = []
        with progress_bar("searching plans", self.console) as advance:
            for done, ((solver, steps), wanted) in enumerate(budgets.items()):
                searched += self._searched(table, solver, steps, wanted)
                advance(done + 1, len(budgets))
        arms += searched
        for depth, budget in shares.items():
            name = _searched_name(controls.solver, controls.steps, budget)
            plan = next(arm.plan for arm in searched if arm.name == name)
            arms += self._controls(table, depth, budget, plan)
        return arms

    def chosen(self, table: ShiftTable) -> list[Arm]:
        """Arms whose step count is chosen with the plan; plans are written and read back as the searched ones.

        Full depth's moments at the step counts are kept in the table's file.
        """
        experiment, arms = self.experiment, []
        for solver, share in product(experiment.solvers, experiment.latency_budgets):
            name = f"chosen-{solver}-b{share:g}"
            path = self.out / f"plan-{name}.json"
            if path.exists():
                plan = self._read(path)
            else:
                table = self._with_bases(table, solver)
                plan = LatencyBudget(share, experiment.latency_reference_steps).choose(
                    table, solver, self.model.process
                )
                plan.save(path)
            arms.append(Arm(name, "chosen", plan, share, plan.figures["predicted_fd"]))
        return arms

    def peers(self, data: Pictures) -> list[Arm]:
        """The peers' arms; what a peer has to train is trained, or found in `out/peers`."""
        experiment, arms = self.experiment, []
        workshop = Workshop(self.out / "peers", data, experiment.distill.fit)
        for peer in experiment.peers:
            model = peer.model(self.model, workshop).eval()
            for solver, steps in experiment.peer_points:
                plan = peer.plan(full_plan(model, solver, steps, experiment.cfg_scale), model.depths)
                plan.check(depths=model.depths)
                name = f"{peer.name}-{solver}-{steps}-{peer.label}"
                arms.append(Arm(name, peer.name, plan, model=model, peer=peer))
        return arms

    def variants(self, data: Pictures) -> list[Arm]:
        """The variants' arms; what they distil, measure and search lies in `out/variants`, and is found there again."""
        arms = []
        for variant in self.experiment.variants:
            folder, model = self.out / "variants" / variant.name, self.model
            own = replace(self, experiment=variant.applied(self.experiment), out=folder)
            trunk = self._trunk() if variant.train is None else None
            if has_own_exits := variant.distill is not None or trunk is None:
                model = model_with_exits(own.experiment, trunk, data, folder, self.console)
            own = replace(own, model=model.to(self.model.device), trunk=trunk)
            table = own.table(None if has_own_exits else self.table())
            if beyond := sorted(set(own.experiment.budgets) - set(own._within(table))):
                least = f"its cheapest plan takes {table.least_share:.2f}"
                self.console.print(f"variant {variant.name}: no plan within {', '.join(map(str, beyond))}, {least}")
            arms += self._arms_of(variant, own, table)
        return arms

    def _arms_of(self, variant: Variant, own: "Preparation", table: ShiftTable) -> list[Arm]:
        """A variant's arms: its searched plans, and where its trunk is another one, that at full depth."""
        arms, family, model = [], f"searched-{variant.name}", own.model
        another_trunk = model.trunk_hash() != self.model.trunk_hash()
        for solver, steps in own.experiment.dynamic_points:
            if another_trunk:
                full = f"full-{variant.name}"
                arm = Arm(f"{full}-{solver}-{steps}", full, own._full(solver, steps), model=model)
                arms.append(own.priced(arm, table))
            for arm in own._searched(table, solver, steps, own._within(table)):
                name = arm.name.replace("searched", family, 1)
                arms.append(replace(own.priced(arm, table), name=name, family=family, model=model))
        return arms

    def _trunk(self) -> DynamicDepth:
        """What exits are distilled from: the trunk as it was given, whatever the comparison's own recipe made of it."""
        trunk = self.trunk or self.model
        alone = DynamicDepth(trunk.backbone, pixel_space=trunk.pixel_space, process=trunk.process)
        return alone.to(self.model.device)

    def _within(self, table: ShiftTable) -> list[float]:
        """The budgets that any plan keeps to."""
        return [budget for budget in self.experiment.budgets if budget >= table.least_share]

    def confidence(self) -> list[Arm]:
        """The confidence router's arms; thresholds, and what they decide at every step, are written to `out`."""
        experiment, settings, arms, decided = self.experiment, self.experiment.confidence, [], []
        if settings is None:
            return arms
        self.console.print("calibrating the confidence router")
        signals = record_signals(
            self.model,
            solver=experiment.calibration_solver,
            num_steps=experiment.calibration_steps,
            cfg_scale=experiment.cfg_scale,
            settings=settings,
        )
        for target in settings.targets:
            thresholds = signals.thresholds(target, settings.num_bands)
            thresholds.save(self.out / f"thresholds-e{target:g}.json")
            model = ConfidentDepth(self.model, thresholds)
            for solver, steps in experiment.dynamic_points:
                name, plan = f"confidence-{solver}-{steps}-e{target:g}", self._full(solver, steps)
                decisions = measure_decisions(model, plan, num_pictures=settings.num_pictures, seed=settings.seed + 1)
                decided.append(decisions.frame().assign(arm=name))
                plan = replace(plan, router="confidence")
                arms.append(Arm(name, "confidence", plan, model=model, decided=decisions))
        pd.concat(decided).to_csv(self.out / "confidence.csv", index=False)
        return arms

    def priced(self, arm: Arm, table: ShiftTable) -> Arm:
        """The arm with the time that the cost model gives its plan; as it is where it runs other than its plan says."""
        if arm.model not in (None, self.model):
            return arm
        return replace(arm, predicted_ms=1e3 * table.cost.plan_seconds(arm.plan) / table.cost.batch_size)

    def _full(self, solver: str, steps: int) -> DepthPlan:
        return full_plan(self.model, solver, steps, self.experiment.cfg_scale)

    def _searched(self, table: ShiftTable, solver: str, steps: int, budgets: list[float]) -> list[Arm]:
        arms, base, full = [], None, self._full(solver, steps)
        for budget in sorted(set(budgets)):  # rising, as a plan starts from those of smaller ones
            name = _searched_name(solver, steps, budget)
            path = plan_file(self.out, Arm(name, "searched", full))
            if path.exists():
                plan = self._read(path)
            else:
                base = base or self._base(table, solver, steps)
                rounds = self.experiment.refinements
                smaller = [arm.plan for arm in arms if arm.budget < budget]
                measure = partial(self._moments, table)
                plan = (
                    refined(table, full, budget, measure, rounds=rounds, base=base, smaller=smaller)
                    if rounds
                    else search(table, full, budget, base=base, starts=smaller)
                )
                plan.save(path)
            arms.append(Arm(name, "searched", plan, budget, plan.figures["predicted_fd"]))
        return arms

    def _read(self, path: Path) -> DepthPlan:
        """A plan that was searched before.

        Raises:
            PlanError: it is another model's.
        """
        plan, model = DepthPlan.load(path), self.model
        plan.check(depths=model.depths, trunk=model.trunk_hash(), exits=model.exits_hash(), origin=str(path))
        return plan

    def _with_bases(self, table: ShiftTable, solver: str) -> ShiftTable:
        """The table with full depth's moments at `latency_steps`; in its file too."""
        with progress_bar("measuring full depth", self.console) as advance:
            return measure_bases(
                self.model,
                table,
                self.extractor,
                solver=solver,
                step_grid=self.experiment.latency_steps,
                batch_size=self.experiment.batch_size,
                into=self.out / "model" / checkpoints.TABLE,
                on_progress=advance,
            )

    def _base(self, table: ShiftTable, solver: str, steps: int) -> Moments:
        """Full depth's moments at these very steps, on the calibration seeds."""
        known = table.base_at(solver, steps) if table.cfg_scale == self.experiment.cfg_scale else None
        return known or self._moments(table, self._full(solver, steps))

    def _moments(self, table: ShiftTable, plan: DepthPlan) -> Moments:
        """Moments under a plan, on the calibration seeds."""
        return measure_moments(
            self.model,
            self.extractor,
            plan,
            num_pictures=table.num_pictures,
            seed=table.seed,
            batch_size=self.experiment.batch_size,
        )

    def _control_depths(self, table: ShiftTable) -> tuple[int, ...]:
        return tuple(sorted({c for c, _ in table.pairs if c > 0} | {self.model.num_blocks}))

    def _control_budgets(self, table: ShiftTable) -> dict[int, float]:
        """Each control's constant depth, and the share of full depth's time it takes."""
        controls = self.experiment.controls
        if controls is None:
            return {}
        full, depths = self._full(controls.solver, controls.steps), self._control_depths(table)
        return {d: round(table.cost.share_of_time(constant(full, depths, d)), 3) for d in controls.depths}

    def _controls(self, table: ShiftTable, depth: int, budget: float, searched: DepthPlan) -> list[Arm]:
        """The constant of this depth, the searched plan reversed, and the ramps closest to the budget from below."""
        controls, depths = self.experiment.controls, self._control_depths(table)
        full = self._full(controls.solver, controls.steps)
        predictor = Predictor(table, full.timesteps, self._base(table, controls.solver, controls.steps))
        plans = [constant(full, depths, depth), reversed_plan(searched)]
        plans += [shuffled(searched, seed) for seed in range(controls.num_shuffled)]
        plans += _ramps_within(full, depths, table, budget, controls.num_ramps)
        return [
            Arm(
                f"{plan.router}-{plan.solver}-{plan.num_steps}-b{budget:.3f}",
                plan.router.split("-")[0],
                plan,
                budget,
                predictor.predict(plan),
            )
            for plan in plans
        ]


def _searched_name(solver: str, steps: int, budget: float) -> str:
    return f"searched-{solver}-{steps}-b{budget:g}"


def _ramps_within(
    full: DepthPlan, depths: tuple[int, ...], table: ShiftTable, budget: float, num: int
) -> list[DepthPlan]:
    """The `num` distinct ramps whose predicted time comes closest to the budget from below."""
    family: dict[tuple, DepthPlan] = {}
    for low, high, power in product(depths, depths, (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)):
        if low < high:
            plan = ramp(full, depths, low, high, power)
            family.setdefault(plan.pairs, plan)
    within = [p for p in family.values() if table.cost.share_of_time(p) <= budget * (1 + 1e-9)]
    return sorted(within, key=table.cost.share_of_time, reverse=True)[:num]
