"""Choose a rival's settings on the calibration seeds, at a time, and make an arm of the best one.

An arm chosen on the pictures that score it looks better than it is. So settings are chosen on the table's seeds, by the
extractor that plans are calibrated on. Everything that was tried is in `tuning.csv`, which also makes it resumable.
"""

import time
from dataclasses import dataclass

import pandas as pd

from dyndit import sealed_csv
from dyndit.analysis.compare.arms import Arm
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.peers import PeerContext, PeerSettings
from dyndit.analysis.compare.tuning import SLACK, Tuning
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan, bind
from dyndit.progress import progress_bar
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample

TUNING = "tuning.csv"
KEY = ("family", "peer", "settings", "solver", "steps", "cfg_scale")
COLUMNS = (*KEY, "share", "fd", "seconds")
"""A row per setting and step count. share: of full depth's time at the reference steps; 0 without a limit. fd: on the
calibration seeds; empty if the time was over the limit. seconds: of training, timing and drawing."""


@dataclass(frozen=True)
class Candidate:
    """One setting at one step count."""

    peer: PeerSettings
    model: DynamicDepth
    plan: DepthPlan


class OutOfReach(InputError):
    """No setting of a tuning is within its time."""


class Tuned:
    """The best setting of each of the experiment's tunings."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`. A tuning without a setting within its time has no arm, and the console says so."""
        tunings, arms = context.experiment.tunings, []
        with progress_bar("tuning rivals", context.console) as advance:
            for number, tuning in enumerate(tunings):
                try:
                    arms.append(_arm(context, tuning.family, choose(context, tuning)))
                except OutOfReach as reason:
                    context.console.print(f"no arm: {reason}")
                advance(number + 1, len(tunings))
        return arms


def choose(context: Context, tuning: Tuning) -> Candidate:
    """Return the setting of least distance on the calibration seeds; of equal ones the faster.

    Raises OutOfReach: no setting is within the time.
    """
    log, tried, spent = _Log(context, tuning), [], 0.0
    trained_in = PeerContext(
        context.out / "peers", context.data, context.experiment.peer_budget, context.experiment.train
    )
    for peer, scale in tuning.settings():
        if tuning.minutes and spent >= 60 * tuning.minutes:
            break
        began, drawn = time.perf_counter(), 0
        model = peer.model(context.model, trained_in).eval()
        for steps in sorted(set(tuning.steps), reverse=True):
            plan = bind(peer.plan(full_plan(model, tuning.solver, steps, scale), model.depths), model)
            row = log.row(Candidate(peer, model, plan), began)
            spent, drawn = spent + row["seconds"], drawn + (row["fd"] is not None)
            tried += [(row["fd"], row["share"], Candidate(peer, model, plan))] if row["fd"] is not None else []
            if tuning.counts and drawn == tuning.counts:
                break
            began = time.perf_counter()
    if not tried:
        limit = f"{tuning.share:g} of full depth's time at {tuning.reference} steps"
        raise OutOfReach(f"tuning {tuning.family}: no setting within {limit}; expected a larger share or fewer steps")
    return min(tried, key=lambda found: found[:2])[2]


def _arm(context: Context, family: str, best: Candidate) -> Arm:
    predicted = context.predicted_ms(best.plan) if best.model is context.model else None
    made = {"model": best.model, "peer": best.peer, "predicted_ms": predicted, "calibration": context.calibration}
    return Arm(family, best.plan, None, f"{best.peer.name}-{best.peer.label}", swept=True, **made)


class _Log:
    """The settings of one tuning that were tried, in the comparison's `tuning.csv`."""

    def __init__(self, context: Context, tuning: Tuning) -> None:
        self.context, self.tuning, self.path = context, tuning, context.out / TUNING
        found, self.sealed = pd.DataFrame(columns=COLUMNS), True
        if self.path.exists():
            self.sealed, found = sealed_csv.check(self.path), sealed_csv.read(self.path, COLUMNS, keep_default_na=False)
        self.rows = [{**row, "fd": None if row["fd"] == "" else float(row["fd"])} for row in found.to_dict("records")]
        self.reference = context.full(tuning.solver, tuning.reference)
        self.full_seconds: float | None = None

    def row(self, candidate: Candidate, began: float) -> dict[str, object]:
        """Return the row of a candidate: known, or timed and, within the limit, drawn and measured now."""
        peer, plan = candidate.peer, candidate.plan
        values = (self.tuning.family, peer.name, peer.label, plan.solver, plan.num_steps, plan.cfg_scale)
        key = dict(zip(KEY, values, strict=True))
        if known := next((row for row in self.rows if all(row[name] == key[name] for name in KEY)), None):
            return known
        limit = self.tuning.share
        share = 0.0 if limit is None else self._share(candidate)
        within = limit is None or share <= limit * SLACK
        fd = self.context.distance(candidate.plan, candidate.model) if within else None
        row = {**key, "share": share, "fd": fd, "seconds": time.perf_counter() - began}
        self.rows.append(row)
        sealed_csv.write(self.path, pd.DataFrame(self.rows, columns=COLUMNS), sealed=self.sealed)
        return row

    def _share(self, candidate: Candidate) -> float:
        """Predict the share of full depth's time. Time one batch of a model that the cost model does not know."""
        if candidate.model is self.context.model and not self.tuning.timed:
            cost = self.context.table.cost
            return cost.plan_seconds(candidate.plan) / cost.plan_seconds(self.reference)
        if self.full_seconds is None:
            self.full_seconds = self._seconds(self.context.model, self.reference)
        return self._seconds(candidate.model, candidate.plan) / self.full_seconds

    def _seconds(self, model: DynamicDepth, plan: DepthPlan) -> float:
        """Time one batch: the faster of two, after one that warms up."""
        size = self.context.experiment.batch_size
        labels = self.context.model.backbone.condition.in_turn(size)
        options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
        options |= {"seed": self.context.experiment.calibration.seed, "batch_size": size}
        return min([sample(model, labels, plan=plan, **options).seconds for _ in range(3)][1:])
