"""Share the model with its exits, the shift table and the searched plans among all sources of arms.

Every stage stores its result on disk. A valid stored result is reused.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from dyndit import sealed_csv
from dyndit.analysis.compare.costs import COSTS, backbone_cost, exits_cost, note
from dyndit.analysis.compare.descents import Rounds
from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.calibration.calibrate import measure_around, measure_bases, measure_moments
from dyndit.calibration.extractor import SEPARATOR
from dyndit.calibration.measure import measure_shifts, of_few_features, part_of
from dyndit.calibration.samplers import OwnSampler, ToPictures
from dyndit.errors import CheckpointError
from dyndit.files import remove
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import same
from dyndit.plans.descent import Descent, descended
from dyndit.plans.plan import DepthPlan, bind, file_name
from dyndit.plans.refined import refined
from dyndit.plans.search import SearchSettings, search
from dyndit.plans.table import FILE, ShiftTable
from dyndit.sampling.loop import full_plan, to_uint8
from dyndit.stats import Moments, frechet_distance
from dyndit.storage import load as checkpoints
from dyndit.training import exit_errors
from dyndit.training.data import Pictures


def model_with_exits(
    experiment: Experiment, backbone: DynamicDepth | None, data: Pictures, out: Path, console: Console
) -> DynamicDepth:
    """Load the model with its exits from `out/model`, or train it and save it there, and what that cost.

    backbone: the given model; None: train one. A model that comes with exits keeps them.
    """
    folder = out / "model"
    if (folder / checkpoints.EXITS).exists():
        console.print(f"backbone and exits: there already ({folder})")
        return checkpoints.load(folder)
    if backbone is None:
        console.print("training the backbone")
        backbone, result = experiment.train.run(data, out / "training")
        fit = experiment.train.fit
        note(out / COSTS, {"name": "backbone", "seed": fit.seed} | backbone_cost(backbone, fit, result))
    model = backbone
    if backbone.exits is None:
        console.print("distilling exits")
        model, result = experiment.distill.run(backbone, data, out / "distillation")
        found = exits_cost(model, experiment.distill, result)
        note(out / COSTS, {"name": "exits", "seed": experiment.distill.fit.seed} | found)
    sealed_csv.write(out / exit_errors.FILE, exit_errors.exit_error_table(model, data))
    checkpoints.save(model, folder)
    return model


DESCENT = 2
"""Distance of the seed of a descent's pictures from the table's seed; the seed between them is of fresh pictures."""
SEARCHES = 1_000
"""Distance between the seeds of several searches for one plan."""


def scaled(joined: Measured) -> Measured:
    """Scale the parts of joined extractors, so that plans, rivals and scores are measured alike. Others stay."""
    if SEPARATOR not in joined.extractor.name:
        return joined
    reduced: Any = of_few_features(joined.extractor, joined.features)[0]
    return Measured(joined.given, reduced)


@dataclass(frozen=True)
class Context:
    """One model of a comparison, with its measurements and its searched plans.

    references: real pictures as each extractor sees them; plans are calibrated on the first extractor. given: the
    user's model before any training here; None: `model`. known: another table; if it holds every entry of this
    context's table, nothing is measured.
    """

    experiment: Experiment
    model: DynamicDepth
    references: tuple[Measured, ...]
    data: Pictures
    out: Path
    console: Console
    given: DynamicDepth | None = None
    known: ShiftTable | None = None
    calibration: int = 0
    """Number of the calibration, of `experiment.num_calibrations`."""
    to_pictures: ToPictures = to_uint8
    """Decoder of a model of latents."""

    @property
    def extractor(self) -> Extractor:
        """Return the extractor that plans are calibrated on."""
        return self.references[0].extractor

    @property
    def backbone(self) -> DynamicDepth:
        """Return the given model without exits; new exits are distilled from it."""
        model = self.given or self.model
        alone = DynamicDepth(model.backbone, pixel_space=model.pixel_space, process=model.process)
        return alone.to(self.model.device)

    @cached_property
    def table(self) -> ShiftTable:
        """Return the shift table: read from beside the model, taken from `known`, or measured."""
        return self._stored_table() or self._known_table() or self._measured_table()

    @property
    def within(self) -> list[float]:
        """Return the experiment's budgets that at least one plan meets."""
        return [budget for budget in self.experiment.budgets if budget >= self.table.least_share]

    def full(self, solver: str, steps: int) -> DepthPlan:
        """Return the full-depth plan at these steps."""
        return full_plan(self.model, solver, steps, self.experiment.cfg_scale)

    def base(self, solver: str, steps: int) -> Moments:
        """Return full depth's moments at the same steps, on the calibration seeds."""
        same_guidance = self.table.cfg_scale == self.experiment.cfg_scale
        known = self.table.base_at(solver, steps) if same_guidance else None
        return known or self.moments(self.full(solver, steps))

    def moments(self, plan: DepthPlan) -> Moments:
        """Sample pictures under a plan on the calibration seeds and return their features' moments."""
        options = {"num_pictures": self.table.num_pictures, "seed": self.table.seed, "to_pictures": self.to_pictures}
        extractor, size = self._seen_by(self.table), self.experiment.batch_size
        return measure_moments(self.model, extractor, plan, batch_size=size, **options)

    def distance(self, plan: DepthPlan, model: DynamicDepth | None = None) -> float:
        """Return the Fréchet distance of pictures drawn on the experiment's calibration seeds. It needs no table.

        model: another one than the comparison's, such as a peer.
        """
        chosen, size = self.experiment.calibration, self.experiment.batch_size
        options = {"num_pictures": chosen.num_pictures, "seed": chosen.seed, "to_pictures": self.to_pictures}
        found = measure_moments(model or self.model, self.extractor, plan, batch_size=size, **options)
        return frechet_distance(found, self.references[0].moments())

    def predicted_ms(self, plan: DepthPlan) -> float:
        """Predict milliseconds per picture with the table's cost model."""
        return 1e3 * self.table.cost.plan_seconds(plan) / self.table.cost.batch_size

    def searched(
        self, solver: str, steps: int, budgets: Sequence[float], on_found: Callable[[float], None] | None = None
    ) -> list[tuple[float, DepthPlan, str]]:
        """Search a plan for each budget -> (budget, plan, name of its file), by rising budget.

        A search starts from the plans of smaller budgets. A plan already stored in `out` is read. on_found(seconds) is
        told how long a search took, before its plan is stored.
        """
        found: list[tuple[float, DepthPlan, str]] = []
        full, base = self.full(solver, steps), None
        for budget in sorted(set(budgets)):
            name = file_name(solver, steps, budget)
            if (self.out / name).exists():
                plan = self.read_plan(name)
            else:
                began, base = time.monotonic(), base or self.base(solver, steps)
                plan, earlier = self._search(full, budget, base, smaller=[plan for _, plan, _ in found])
                if on_found is not None:
                    on_found(time.monotonic() - began + earlier)
                plan.save(self.out / name)
            found.append((budget, plan, name))
        return found

    def read_plan(self, name: str) -> DepthPlan:
        """Read a plan from `out`. Raises PlanError: the plan belongs to another model."""
        return bind(DepthPlan.load(self.out / name), self.model, origin=str(self.out / name))

    def with_bases(self, solver: str) -> ShiftTable:
        """Add full depth's moments at the experiment's `latency_steps` to the table and its file; return the table."""
        options = {"solver": solver, "step_grid": self.experiment.latency_steps, "into": self._table_file}
        options |= {"batch_size": self.experiment.batch_size, "to_pictures": self.to_pictures}
        return measure_bases(self.model, self.table, self._seen_by(self.table), **options)

    @property
    def _table_file(self) -> Path:
        return self.out / "model" / FILE

    @property
    def _calibration_point(self) -> dict[str, Any]:
        """Return solver, number of steps and guidance scale that the table is measured at."""
        experiment, scale = self.experiment, self.experiment.calibration_cfg_scale or self.experiment.cfg_scale
        return {"solver": experiment.calibration_solver, "num_steps": experiment.calibration_steps, "cfg_scale": scale}

    def _search(
        self, full: DepthPlan, budget: float, base: Moments, smaller: list[DepthPlan]
    ) -> tuple[DepthPlan, float]:
        """Return the plan, and the seconds that an earlier attempt spent on it."""
        chosen = self.experiment
        rounds, settings = chosen.refinements, SearchSettings(seed=chosen.search_seed, whole=chosen.whole)
        options: dict[str, Any] = {"base": base, "settings": settings}
        if not rounds:
            plan = search(self.table, full, budget, starts=smaller, **options)
        else:
            plan = refined(self.table, full, budget, self.moments, rounds=rounds, smaller=smaller, **options)
        if chosen.descent is None:
            return plan, 0.0
        measure = self._rounds(full, chosen.descent)
        seeds = [chosen.search_seed + SEARCHES * k for k in range(1, chosen.descent.searches)]
        more = [search(self.table, full, budget, base=base, settings=replace(settings, seed=seed)) for seed in seeds]
        options |= {"starts": [*smaller, *more], "descent": chosen.descent}
        return descended(self.table, full, plan, measure, **options), measure.earlier

    def _rounds(self, full: DepthPlan, descent: Descent) -> Rounds:
        """Return how a descent measures plans on its own pictures, and where it keeps what it measured."""
        options = {"num_pictures": descent.num_pictures, "seed": self.table.seed + DESCENT}
        options |= {"batch_size": self.experiment.batch_size}
        extractor, identity = self._seen_by(self.table), self.model.identity
        key = f"{identity} {extractor.fingerprint} {full.solver} {full.cfg_scale} {full.timesteps} {options}"

        def measure(plan: DepthPlan, others: Sequence[DepthPlan]) -> list[Moments]:
            return measure_around(self.model, extractor, plan, others, to_pictures=self.to_pictures, **options)

        return Rounds(self.out / "descent", key, measure)

    def _stored_table(self) -> ShiftTable | None:
        """Return the table in `out/model` if it is readable and belongs to this model and this extractor."""
        path = self._table_file
        if not path.exists():
            return None
        try:
            table = ShiftTable.load(path)
        except CheckpointError as error:
            self.console.print(f"{error}: measured again")
            return None
        mine = self.model.identity
        if not (same(table.backbone, mine.backbone) and same(table.exits, mine.exits)):
            self.console.print(f"{path}: of another model; measured again")
            return None
        if table.extractor_fingerprint != self._seen_by(table).fingerprint:
            # This table came with the model: searching on it would optimise for another extractor.
            name, of = self.extractor.name, table.extractor
            theirs = of if of != name else f"other weights of {of}"
            self.console.print(f"{path}: of {theirs}, not this comparison's {name}; measured again")
            return None
        remove(path.with_suffix(".partial"))  # of a run that was killed when the table was whole
        self.console.print(f"shift table: there already ({path})")
        return table

    def _seen_by(self, table: ShiftTable) -> Extractor:
        """Return the extractor with the table's reduction to few features, if it has one."""
        return self.extractor if table.projection is None else self.extractor.projected(table.projection)

    def _known_table(self) -> ShiftTable | None:
        """Return the part of the known table that equals this context's table; None if entries are missing."""
        if self.known is None:
            return None
        if self.known.extractor_fingerprint != self._seen_by(self.known).fingerprint:
            return None
        calibration = self.experiment.calibration
        sampler = OwnSampler(self.model, **self._calibration_point, seed=calibration.seed)
        return part_of(self.known, sampler, calibration)

    def _measured_table(self) -> ShiftTable:
        options = self._calibration_point | {"settings": self.experiment.calibration, "into": self._table_file}
        extractor, reference = of_few_features(self.extractor, self.references[0].features)

        def noted(seconds: float) -> None:  # the cost first: a table in its file is done
            note(self.out / COSTS, {"name": "table", "seed": self.experiment.calibration.seed, "seconds": seconds})

        options |= {"to_pictures": self.to_pictures, "on_measured": noted}
        return measure_shifts(self.model, extractor, reference, **options)
