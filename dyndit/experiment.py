"""One comparison from trunk to report: what `dyndit quickstart` and `dyndit compare` run.

distil exits -> measure the shift table -> search plans -> make the peers -> sample every arm from the same fresh seeds
-> report. Every stage leaves its result on disk; what is there and valid is not done again.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dyndit import checkpoints, manifest
from dyndit.analysis.extractors import Extractor, load_extractor
from dyndit.analysis.features import Measured
from dyndit.analysis.fidelity import Moments
from dyndit.analysis.frontier import COLUMNS, RUNS, append_run, measured
from dyndit.analysis.macs import count_macs, model_macs
from dyndit.analysis.peers import Peer, PeerSettings, Workshop
from dyndit.analysis.peers.random_plan import shuffled
from dyndit.analysis.quality import score
from dyndit.analysis.sets import PictureSet
from dyndit.calibration import STEP_GRID, CalibrationSettings, measure_bases, measure_moments, measure_shifts
from dyndit.data import Pictures, open_data
from dyndit.dynamic import DynamicDepth
from dyndit.errors import CheckpointError, InputError
from dyndit.plan import DepthPlan
from dyndit.routers.confidence import ConfidenceSettings, ConfidentDepth, Decisions, measure_decisions, record_signals
from dyndit.routers.learned import LearnedRouter, LearnedSettings, train_router
from dyndit.routers.refined import refined
from dyndit.routers.schedules import constant, ramp, reversed_plan
from dyndit.routers.searched import Predictor, ShiftTable, search
from dyndit.routers.steps import LatencyBudget
from dyndit.sampler import Samples, balanced_labels, full_plan, sample, unguided
from dyndit.tasks import Distill, Train, exit_error_table

LEARNED = "learned.safetensors"
"""The learned router's name in a comparison's folder."""


@dataclass(frozen=True)
class Controls:
    """Fixed schedules to hold the searched plan against, at one solver and step count, at equal time.

    depths: constant depths; each sets a budget (its own predicted time) for a searched plan, that plan's reversal,
    `num_shuffled` random orders of its steps, and the `num_ramps` ramps that come closest to the budget from below.
    """

    solver: str = "ddim"
    steps: int = 10
    depths: tuple[int, ...] = ()
    num_ramps: int = 10
    num_shuffled: int = 0


@dataclass(frozen=True)
class Variant:
    """Plans made another way, measured beside the comparison's own: how an ablation is asked for.

    name: the family of its arms is "searched-NAME"; where its trunk is another one, "full-NAME" is that trunk at full
    depth, at the experiment's points. What is None is the experiment's: distill, calibration, and what its table is
    measured with (a solver, its steps, a guidance scale), to see what a table is worth elsewhere.
    """

    name: str
    distill: Distill | None = None
    calibration: CalibrationSettings | None = None
    calibration_solver: str | None = None
    calibration_steps: int | None = None
    calibration_cfg_scale: float | None = None
    refinements: int | None = None


@dataclass(frozen=True)
class Experiment:
    """What to compare, and on how many pictures. Scoring seeds are 0, 1, ...; calibration has its own."""

    model: str
    data: str
    extractor: str
    distill: Distill
    train: Train | None = None
    """How to train the trunk from scratch, where that is asked for."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    calibration_solver: str = "ddim"
    calibration_steps: int = 10
    calibration_cfg_scale: float | None = None
    """None: `cfg_scale`. Another one shows what a table is worth under a guidance that it was not measured with."""
    refinements: int = 0
    """Rounds in which a searched plan is measured and the prediction corrected by it (`routers.refined`)."""
    solvers: tuple[str, ...] = ("ddim", "unipc")
    full_solvers: tuple[str, ...] = ()
    """Further solvers, at full depth alone: a better solver is what plans have to beat too."""
    full_steps: tuple[int, ...] = (5, 6, 7, 8, 10, 12, 14, 17, 20)
    dynamic_steps: tuple[int, ...] = (10, 20)
    points: tuple[tuple[str, int], ...] = ()
    """(solver, steps) of plans and peers, where that is not every solver at each of `dynamic_steps` or `peer_steps`."""
    full_points: tuple[tuple[str, int], ...] = ()
    """(solver, steps) of full depth, where that is not every solver at each of `full_steps`."""
    unguided_points: tuple[tuple[str, int], ...] = ()
    """Likewise of full depth without guidance."""
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    latency_budgets: tuple[float, ...] = ()
    """Shares of full depth's time at `latency_reference_steps`, for each of which the step count is chosen too."""
    latency_reference_steps: int = 20
    latency_steps: tuple[int, ...] = STEP_GRID
    """What step counts are chosen among; plans that are come as arms of family "chosen"."""
    unguided_steps: tuple[int, ...] = ()
    """Full depth without guidance at these step counts: a plan that drops guidance must not hide behind depth."""
    controls: Controls | None = None
    variants: tuple[Variant, ...] = ()
    """Other ways to make exits and plans, each searched at every solver, step count and budget."""
    learned: LearnedSettings | None = None
    """A learned router's plans, at every solver, dynamic step count and budget; None for none."""
    confidence: ConfidenceSettings | None = None
    """A confidence router at every solver, dynamic step count and error target; None for none."""
    peers: tuple[PeerSettings, ...] = ()
    """What else a user might pick (`dyndit.analysis.peers`), at every solver and `peer_steps`."""
    peer_steps: tuple[int, ...] = (10,)
    cfg_scale: float = 1.5
    metrics: tuple[str, ...] = ("fd",)
    """Of `evaluate`, measured on every arm and block: fd, and kid, is, prc besides."""
    witnesses: tuple[str, ...] = ()
    """Further extractors, with weights of their own, that score the same pictures; no plan is chosen by them."""
    num_blocks: int = 5
    num_images: int = 600
    batch_size: int = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: every arm's network, peers' included, computes its products under autocast. Extractors never do."""
    margin: float = 0.05
    """Non-inferiority margin, as a share of full depth's Fréchet distance."""

    @property
    def dynamic_points(self) -> tuple[tuple[str, int], ...]:
        """(solver, steps) at which plans are searched."""
        return self.points or tuple(product(self.solvers, self.dynamic_steps))

    @property
    def peer_points(self) -> tuple[tuple[str, int], ...]:
        """(solver, steps) at which peers run."""
        return self.points or tuple(product(self.solvers, self.peer_steps))

    def autocast(self, device: str) -> AbstractContextManager:
        """The precision that everything is drawn in."""
        halved = self.precision == "bf16"
        return torch.autocast(torch.device(device).type, torch.bfloat16) if halved else nullcontext()


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


@dataclass(frozen=True)
class Inputs:
    """What the user may put in place of the experiment's own choices."""

    model: str = ""
    data: str = ""
    extractor_weights: Path | None = None
    from_scratch: bool = False
    device: str = "cpu"


def run(experiment: Experiment, out: Path, inputs: Inputs | None = None, console: Console | None = None) -> Path:
    """Run the comparison in `out` and return it; `dyndit.analysis.read_runs(out)` has the figures.

    Raises:
        InputError: `out` holds another run, or an input does not fit.
    """
    inputs, console = inputs or Inputs(), console or Console(stderr=True)
    manifest.check_device(inputs.device)
    data = open_data(inputs.data or experiment.data)
    extractor = load_extractor(experiment.extractor, inputs.extractor_weights, inputs.device)
    trunk = None if inputs.from_scratch else checkpoints.load(inputs.model or experiment.model, device=inputs.device)
    if trunk is None and experiment.train is None:
        raise InputError("--from-scratch: this experiment has no recipe for its trunk")
    if trunk is not None and not trunk.pixel_space:
        raise InputError(f"--model {inputs.model}: makes latents; expected a model of pixels")
    extractors = [extractor, *(load_extractor(name, device=inputs.device) for name in experiment.witnesses)]
    identity = {
        "trunk": "" if trunk is None else trunk.trunk_hash(),
        "exits": "" if trunk is None else trunk.exits_hash(),
        "extractor": extractor.fingerprint,
        "witnesses": [witness.fingerprint for witness in extractors[1:]],
        "machine": manifest.machine(inputs.device),
    }
    manifest.claim(out, _settings(experiment, inputs, data) | identity)
    model = _model(experiment, trunk, data, out, console).to(inputs.device)
    if trunk is not None and trunk.exits is not None:
        _hand_over(Path(inputs.model or experiment.model) / checkpoints.TABLE, out / "model" / checkpoints.TABLE)
    real = PictureSet(inputs.data or experiment.data, data.uint8())
    judges = tuple(Measured(real, judge) for judge in extractors)
    comparison = _Comparison(experiment, model, judges, out, console)
    with experiment.autocast(inputs.device):
        table = comparison.table()
        arms = comparison.arms(table) + comparison.chosen(table) + comparison.peers(data)
        arms = [comparison.priced(arm, table) for arm in arms]
        arms += comparison.variants(data) + comparison.learned(table) + comparison.confidence()
        comparison.measure(arms)
        comparison.report(arms)
    return out


def _settings(experiment: Experiment, inputs: Inputs, data: Pictures) -> dict[str, object]:
    """What makes a run this run. The noise schedule's tables are constants of the code, not settings."""
    choices = asdict(experiment)
    for recipe in (choices["train"], choices["distill"], *(variant["distill"] for variant in choices["variants"])):
        if recipe:
            recipe.pop("schedule", None)
    if not experiment.latency_budgets:  # runs made before there were any go on
        choices = {name: of for name, of in choices.items() if not name.startswith("latency_")}
    for name in ("learned", "confidence"):  # a run that was begun before there were any goes on
        if choices[name] is None:
            choices.pop(name)
    choices["peers"] = [{"peer": peer.name, **asdict(peer)} for peer in experiment.peers]
    return {"experiment": choices, "inputs": asdict(inputs), "data": data.fingerprint}


def _model(
    experiment: Experiment, trunk: DynamicDepth | None, data: Pictures, out: Path, console: Console
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


def _hand_over(table: Path, place: Path) -> None:
    """Copy the shift table that lies beside the given model; whether it is this model's is seen when it is read."""
    if table.is_file() and not place.exists():
        shutil.copyfile(table, place)


@dataclass(frozen=True)
class _Comparison:
    """The stages after the exits, and what they all need."""

    experiment: Experiment
    model: DynamicDepth
    judges: tuple[Measured, ...]
    """Real pictures as each extractor sees them; plans are searched for the first."""
    out: Path
    console: Console

    @property
    def extractor(self) -> Extractor:
        """What plans are calibrated on."""
        return self.judges[0].extractor

    def table(self) -> ShiftTable:
        """The shift table, from beside the model where it is there and this model's."""
        path, experiment = self.out / "model" / checkpoints.TABLE, self.experiment
        if path.exists():
            try:
                table = ShiftTable.load(path)
            except CheckpointError as error:
                self.console.print(f"{error}: measured again")
            else:
                if (table.trunk, table.exits) == (self.model.trunk_hash(), self.model.exits_hash()):
                    self.console.print(f"shift table: there already ({path})")
                    return table
        with progress_bar("measuring distribution shifts", self.console) as advance:
            return measure_shifts(
                self.model,
                self.extractor,
                self.judges[0].moments(),
                solver=experiment.calibration_solver,
                num_steps=experiment.calibration_steps,
                cfg_scale=experiment.calibration_cfg_scale or experiment.cfg_scale,
                settings=experiment.calibration,
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
        budgets = {key: list(dict.fromkeys(wanted)) for key, wanted in budgets.items()}
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
                plan = LatencyBudget(share, experiment.latency_reference_steps).choose(table, solver)
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
            changes = {k: v for k, v in vars(variant).items() if k != "name" and v is not None}
            experiment, folder = replace(self.experiment, **changes), self.out / "variants" / variant.name
            model = self.model
            if variant.distill is not None:
                trunk = DynamicDepth(model.backbone, pixel_space=model.pixel_space)
                model = _model(experiment, trunk, data, folder, self.console).to(self.model.device)
            own = replace(self, experiment=experiment, model=model, out=folder)
            table, family = own.table(), f"searched-{variant.name}"
            within = [budget for budget in experiment.budgets if budget >= table.least_share]
            if beyond := sorted(set(experiment.budgets) - set(within)):
                least = f"its cheapest plan takes {table.least_share:.2f}"
                self.console.print(f"variant {variant.name}: no plan within {', '.join(map(str, beyond))}, {least}")
            another_trunk = model.trunk_hash() != self.model.trunk_hash()
            for solver, steps in experiment.dynamic_points:
                if another_trunk:
                    full = f"full-{variant.name}"
                    arm = Arm(f"{full}-{solver}-{steps}", full, own._full(solver, steps), model=model)
                    arms.append(own.priced(arm, table))
                for arm in own._searched(table, solver, steps, within):
                    name = arm.name.replace("searched", family, 1)
                    arms.append(replace(own.priced(arm, table), name=name, family=family, model=model))
        return arms

    def learned(self, table: ShiftTable) -> list[Arm]:
        """The learned router's arms; the router and its plans are written to `out`, and found there again."""
        experiment, path, arms = self.experiment, self.out / LEARNED, []
        if experiment.learned is None:
            return arms
        if path.exists():
            router = LearnedRouter.load(path)
        else:
            self.console.print("training the learned router")
            router = train_router(table, experiment.learned)
            router.save(path)
        for solver, steps in experiment.dynamic_points:
            full, predictor = self._full(solver, steps), None
            for budget in experiment.budgets:
                arm = Arm(f"learned-{solver}-{steps}-b{budget:g}", "learned", full, budget)
                if (file := self._plan_file(arm)).exists():
                    plan = DepthPlan.load(file)
                else:
                    plan = router.plan(full, budget)
                    predictor = predictor or Predictor(table, full.timesteps, self._base(table, solver, steps))
                    plan = replace(plan, figures=plan.figures | {"predicted_fd": predictor.predict(plan)})
                    plan.save(file)
                plan.check(depths=self.model.depths, trunk=table.trunk, exits=table.exits, origin=str(file))
                arms.append(self.priced(replace(arm, plan=plan, predicted_fd=plan.figures["predicted_fd"]), table))
        return arms

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

    def _macs(self, arms: Iterable[Arm]) -> dict[str, float]:
        """Multiply-accumulates of the denoiser per picture by arm; where the data may decide (peers), on a batch."""
        num, parts, counted = min(self.experiment.batch_size, self.experiment.num_images), {}, {}
        for arm in arms:
            model = arm.model or self.model
            if isinstance(model, Peer | ConfidentDepth):
                counted[arm.name] = count_macs(lambda arm=arm: self._draw(arm, seed=0, num=num)) / num
            else:
                parts[id(model)] = parts.get(id(model)) or model_macs(model)
                counted[arm.name] = parts[id(model)].plan(arm.plan)
        return counted

    def measure(self, arms: list[Arm]) -> None:
        """Sample and score every arm on every seed block.

        Within a block the arms take turns batch by batch, so that a machine that slows down slows all of them. A block
        that was broken off is drawn anew by the arms that have no row of it yet.
        """
        experiment, path = self.experiment, self.out / RUNS
        done = measured(path) if path.exists() else set()
        batches, size = -(-experiment.num_images // experiment.batch_size), experiment.batch_size
        missing = {
            block: [arm for arm in arms if (arm.name, block) not in done] for block in range(experiment.num_blocks)
        }
        total = batches * experiment.num_blocks * len(arms)
        count = total - batches * sum(map(len, missing.values()))
        if count < total:
            for arm in {(arm.family, id(arm.model)): arm for arm in arms}.values():  # warm-up
                self._draw(arm, seed=0, num=min(size, experiment.num_images))
        macs = self._macs({arm.name: arm for waiting in missing.values() for arm in waiting}.values())
        with progress_bar("sampling and scoring", self.console) as advance:
            for block, waiting in missing.items():
                drawn: dict[str, list[Samples]] = {arm.name: [] for arm in waiting}
                for batch in range(batches):
                    num = min(size, experiment.num_images - batch * size)
                    for arm in in_turn(waiting, block, batch):
                        part = self._draw(arm, seed=block, num=num, first=batch * size, stats=True)
                        drawn[arm.name].append(part)
                        count += 1
                        advance(count, total)
                for arm in waiting:
                    append_run(path, *self._rows(arm, block, drawn.pop(arm.name), macs[arm.name]))

    def report(self, arms: list[Arm]) -> None:
        """Figures and pages from what lies in `out`."""
        from dyndit.analysis import figures, write_report

        searched = [arm for arm in arms if arm.family == "searched"]
        figures.save(figures.plan_figure({arm.name: asdict(arm.plan) for arm in searched}), self.out / "plan.png")
        if (self.out / "exit-errors.csv").exists():
            errors = pd.read_csv(self.out / "exit-errors.csv")
            table = errors.pivot(index="depth", columns="log_snr_low", values="noise_error").sort_index(axis=1)
            figures.save(figures.error_figure(table, "mean squared error on the noise"), self.out / "errors.png")
        rows, first = {}, dict(reversed(self.experiment.dynamic_points))
        for solver, steps in first.items():
            chosen = [arm for arm in arms if (arm.plan.solver, arm.plan.num_steps) == (solver, steps)]
            full = [arm for arm in chosen if arm.family == "full"]
            dynamic = sorted((arm for arm in chosen if arm in searched), key=lambda arm: -arm.budget)
            peers = list({arm.family: arm for arm in reversed(chosen) if arm.peer is not None}.values())
            rows |= {arm.name: self._draw(arm, seed=0, num=10).pictures for arm in full + dynamic + peers}
        figures.save(figures.samples_figure(rows), self.out / "samples.png")
        write_report(self.out, self.out, margin=self.experiment.margin)

    def _full(self, solver: str, steps: int) -> DepthPlan:
        return full_plan(self.model, solver, steps, self.experiment.cfg_scale)

    def _draw(self, arm: Arm, *, seed: int, num: int, first: int = 0, stats: bool = False) -> Samples:
        """Pictures `first` to `first + num - 1` of an arm; every class in turn."""
        # The plan was checked against the weights when it was made; hashing them for every batch takes longer than it.
        plan = replace(arm.plan, trunk="", exits="")
        return sample(
            arm.model or self.model,
            balanced_labels(first + num, self.model.backbone.num_classes)[first:],
            plan=plan,
            solver=plan.solver,
            num_steps=plan.num_steps,
            cfg_scale=plan.cfg_scale,
            seed=seed,
            first_index=first,
            batch_size=self.experiment.batch_size,
            stats=stats,
        )

    def _rows(self, arm: Arm, block: int, drawn: list[Samples], macs: float) -> list[dict[str, object]]:
        """Score the batches that one arm drew of one block: a row of runs.csv for each judge."""
        experiment, plan, parameter = self.experiment, arm.plan, next(self.model.parameters())
        pictures = torch.cat([part.pictures for part in drawn])
        # A peer's blocks are not those of its plan, unless it is one.
        cond, uncond = plan.mean_depth if arm.peer is None or arm.model is self.model else (None, None)
        share = plan.share_of_blocks if arm.peer is None else arm.peer.share_of_blocks(plan)
        if arm.decided is not None:  # both branches leave together
            cond = arm.decided.mean_depth.mean().item()
            uncond, share = cond * plan.guided, cond / plan.num_blocks
        figures = {
            "run": self.out.name,
            "machine": manifest.machine(parameter.device.type),
            "model": self.model.trunk_hash(),
            "arm": arm.name,
            "family": arm.family,
            "solver": plan.solver,
            "steps": plan.num_steps,
            "budget": arm.budget,
            "cfg_scale": experiment.cfg_scale,
            "block": block,
            "seed": block,
            "num_images": experiment.num_images,
            "share_of_blocks": share,
            "mean_depth_cond": cond,
            "mean_depth_uncond": uncond,
            "ms_per_picture": 1e3 * sum(part.seconds for part in drawn) / experiment.num_images,
            "ms_denoiser": 1e3 * sum(sum(part.network_seconds) for part in drawn) / experiment.num_images,
            "role": "score",
            "plan": self._plan_file(arm).name if arm.family in ("searched", "chosen") else "",
            "macs": macs,
            "predicted_ms": arm.predicted_ms,
            "compiled": "eager",
            "dtype": "bf16 autocast" if experiment.precision == "bf16" else str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": experiment.batch_size,
        }
        return [
            dict.fromkeys(COLUMNS)
            | figures
            | {
                "extractor": judge.extractor.name,
                "metric": judge.extractor.metric_name,
                "predicted_fd": arm.predicted_fd if judge is self.judges[0] else None,
            }
            | {k: v for k, v in score(pictures, judge, experiment.metrics).items() if k in COLUMNS}
            for judge in self.judges
        ]

    def _plan_file(self, arm: Arm) -> Path:
        return self.out / f"plan-{arm.name.removeprefix('searched-')}.json"

    def _searched(self, table: ShiftTable, solver: str, steps: int, budgets: list[float]) -> list[Arm]:
        arms, base, full = [], None, self._full(solver, steps)
        for budget in budgets:
            name = _searched_name(solver, steps, budget)
            path = self._plan_file(Arm(name, "searched", full))
            if path.exists():
                plan = self._read(path)
            else:
                base = base or self._base(table, solver, steps)
                rounds = self.experiment.refinements
                measure = partial(self._moments, table)
                plan = (
                    refined(table, full, budget, measure, rounds=rounds, base=base)
                    if rounds
                    else search(table, full, budget, base=base)
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
        return tuple(sorted({c for c, _ in table.pairs} | {self.model.num_blocks}))

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


def in_turn(arms: list[Arm], block: int, batch: int) -> list[Arm]:
    """The order in which the arms draw a batch: a random one, then the same backwards.

    In two batches each arm comes as often before another as after it, so a steady drift cancels between them.
    """
    order = list(arms)
    random.Random(f"{block} {batch // 2}").shuffle(order)
    return order[::-1] if batch % 2 else order


@contextmanager
def progress_bar(title: str, console: Console, every: float = 30.0) -> Iterator[Callable[[int, int], None]]:
    """A bar with elapsed and remaining time; yields `advance(done, total)`.

    Where standard error is no terminal, a plain line about every `every` seconds.
    """
    if not console.is_terminal:
        began = said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= every or done == total:
                left = (now - began) / max(done, 1) * (total - done)
                console.print(f"{title}: {done} of {total}, {now - began:.0f} s, about {left:.0f} s left")
                said = now

        yield say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
