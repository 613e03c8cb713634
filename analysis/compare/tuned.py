"""Choose a rival's settings on the calibration seeds, at a time, and make an arm of the best one.

The best setting then takes the searched plan's time, or the next slower step count. A rival has less time only if
none of its step counts takes as long.

An arm chosen on the pictures that score it looks better than it is. So settings are chosen on the table's seeds, by the
extractor that plans are calibrated on. Everything that was tried is in `tuning.csv`, which also makes it resumable.
"""

import math
import time
from dataclasses import dataclass, replace

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
from dyndit.rounds import Reading, Repeats, paired_rounds
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample

TUNING = "tuning.csv"
KEY = ("family", "peer", "settings", "solver", "steps", "cfg_scale")
COLUMNS = (*KEY, "share", "fd", "seconds")
"""A row per setting and step count. share: of full depth's time at the reference steps; 0 without a limit. fd: on the
calibration seeds; empty if the time was over the limit. seconds: of training, timing and drawing."""

NUMBERS = ("cfg_scale", "share", "fd", "seconds")
MATCHED, RATIO = "matched.csv", (*KEY, "ratio")
"""A row per setting that was timed against the searched plan: its time over the plan's, median over rounds."""
MATCHING, ROUNDS = 0.02, Repeats(6, until=0.02, most=30)
"""Times are equal within this share; rounds of timing."""
GLANCE = Repeats(2, warmup=0)
"""Rounds that say which step counts of a setting are worth drawing."""


@dataclass(frozen=True)
class Candidate:
    """One setting at one step count.  fd: on the calibration seeds; NaN: not drawn."""

    peer: PeerSettings
    model: DynamicDepth
    plan: DepthPlan
    fd: float = math.nan


class OutOfReach(InputError):
    """No setting of a tuning is within its time."""


class Tuned:
    """The best setting of each of the experiment's tunings."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`. A tuning without a setting within its time has no arm, and the console says so."""
        tunings, found, arms = context.experiment.tunings, [], []
        with progress_bar("tuning rivals", context.console) as advance:
            for number, tuning in enumerate(tunings):
                try:
                    found.append((tuning, choose(context, tuning)))
                except OutOfReach as reason:
                    context.console.print(f"no arm: {reason}")
                advance(number + 1, len(tunings))
        for tuning, best in found:
            rivals = [other for one, other in found if one.group == tuning.group] if tuning.group else [best]
            if best is min(rivals, key=lambda one: one.fd):
                made = matched(context, tuning, best) if tuning.matched else best
                arms.append(_arm(context, tuning.group or tuning.family, made))
        return arms


def choose(context: Context, tuning: Tuning) -> Candidate:
    """Return the setting of least distance on the calibration seeds; of equal ones the faster.

    Raises OutOfReach: no setting is within the time.
    """
    log, tried, spent, models = _Log(context, tuning), [], 0.0, {}
    trained_in = PeerContext(
        context.out / "peers", context.data, context.experiment.peer_budget, context.experiment.train
    )
    for peer, scale in tuning.settings():
        if tuning.minutes and spent >= 60 * tuning.minutes:
            break
        began, drawn = time.perf_counter(), 0
        if peer not in models:  # once for all scales: a model that trains is large
            models[peer] = peer.model(context.model, trained_in).eval()
        model = models[peer]
        for steps in sorted(set(tuning.steps), reverse=True):
            one = Candidate(peer, model, candidate_plan(peer, model, tuning.solver, steps, scale))
            row = log.row(one, began)
            spent, drawn = spent + row["seconds"], drawn + (row["fd"] is not None)
            tried += [(row["fd"], row["share"], replace(one, fd=row["fd"]))] if row["fd"] is not None else []
            if tuning.counts and drawn == tuning.counts:
                break
            began = time.perf_counter()
    if not tried:
        limit = f"{tuning.share:g} of full depth's time at {tuning.reference} steps"
        raise OutOfReach(f"tuning {tuning.family}: no setting within {limit}; expected a larger share or fewer steps")
    return min(tried, key=lambda found: found[:2])[2]


def candidate_plan(peer: PeerSettings, model: DynamicDepth, solver: str, steps: int, cfg_scale: float) -> DepthPlan:
    """Return the plan of a setting.  model: that the setting runs."""
    return bind(peer.plan(full_plan(model, solver, steps, cfg_scale), model.depths), model)


def matched(context: Context, tuning: Tuning, best: Candidate) -> Candidate:
    """Return the best setting at the least step count of the tuning that takes the searched plan's time.

    It is timed against the plan of the tuning's share, in turns, and other step counts are taken to cost in proportion.
    Times are equal within `MATCHING`. If no count takes as long, the largest stays. The ratio is kept in `matched.csv`.
    """
    path, plan = context.out / MATCHED, best.plan
    key = (tuning.family, best.peer.name, best.peer.label, plan.solver, str(plan.num_steps), str(plan.cfg_scale))
    found = pd.DataFrame(columns=RATIO)
    if path.exists():
        found = sealed_csv.read(path, RATIO, dtype=str, keep_default_na=False)
    known = found[[tuple(row) == key for row in found[list(KEY)].itertuples(index=False)]]
    if known.empty:
        ratio = _ratio(context, tuning, best)
        found.loc[len(found)] = [*key, repr(ratio)]
        sealed_csv.write(path, found)
    else:
        ratio = float(known["ratio"].iloc[0])
    counts = sorted({*tuning.steps, plan.num_steps})
    long_enough = [steps for steps in counts if ratio * steps / plan.num_steps >= 1 - MATCHING]
    steps = min(long_enough, default=counts[-1])
    if steps == plan.num_steps:
        return best
    other = candidate_plan(best.peer, best.model, plan.solver, steps, plan.cfg_scale)
    return replace(best, plan=other, fd=math.nan)


def _ratio(context: Context, tuning: Tuning, best: Candidate) -> float:
    """Return how many times as long as the searched plan a setting takes."""
    ((_, searched, _),) = context.searched(tuning.solver, tuning.reference, (tuning.share,))
    return _times_as_long(context, best, searched, ROUNDS, f"matching {tuning.family}")


def _times_as_long(context: Context, rival: Candidate, plan: DepthPlan, rounds: Repeats, title: str) -> float:
    """Time batches of a setting and of a plan of the comparison's model in turns; return the median ratio."""
    size = context.experiment.batch_size
    labels = context.model.backbone.condition.in_turn(size)

    def call(model: DynamicDepth, plan: DepthPlan) -> list[Reading]:
        options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
        options |= {"seed": context.experiment.calibration.seed, "batch_size": size}
        return [Reading("", sample(model, labels, plan=plan, **options).seconds)]

    arms = {"plan": lambda: call(context.model, plan), "rival": lambda: call(rival.model, rival.plan)}
    times = paired_rounds(arms, rounds, "plan", title=title)
    table = times.pivot(index="round", columns="arm", values="seconds")
    return float((table["rival"] / table["plan"]).median())


def _arm(context: Context, family: str, best: Candidate) -> Arm:
    predicted = context.predicted_ms(best.plan) if best.model is context.model else None
    made = {"model": best.model, "peer": best.peer, "predicted_ms": predicted, "calibration": context.calibration}
    return Arm(family, best.plan, None, f"{best.peer.name}-{best.peer.label}", swept=True, **made)


def _number(text: str) -> float | None:
    return float(text) if text else None


class _Log:
    """The settings of one tuning that were tried, in the comparison's `tuning.csv`."""

    def __init__(self, context: Context, tuning: Tuning) -> None:
        self.context, self.tuning, self.path = context, tuning, context.out / TUNING
        exact = {"keep_default_na": False, "dtype": str}  # text, so that no number changes on its way
        found, self.sealed = pd.DataFrame(columns=COLUMNS), True
        if self.path.exists():
            self.sealed, found = sealed_csv.check(self.path), sealed_csv.read(self.path, COLUMNS, **exact)
        self.rows = [
            {**row, "steps": int(row["steps"]), **{name: _number(row[name]) for name in NUMBERS}}
            for row in found.to_dict("records")
        ]
        self.reference = context.full(tuning.solver, tuning.reference)
        self.timed: dict[tuple[PeerSettings, bool], float] = {}
        """Shares at the reference steps, by setting and whether it is guided."""

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
        """Predict the share of full depth's time.

        The table's cost model does so for plans of the comparison's model. A peer with a model of its own is timed
        once, at the reference steps, in turns with full depth; its other step counts are taken to cost in proportion.
        """
        peer, model, plan = candidate.peer, candidate.model, candidate.plan
        if model is self.context.model:
            cost = self.context.table.cost
            return cost.plan_seconds(plan) / cost.plan_seconds(self.reference)
        if (key := (peer, plan.cfg_scale != 1)) not in self.timed:
            at = candidate_plan(peer, model, plan.solver, self.tuning.reference, plan.cfg_scale)
            one, title = Candidate(peer, model, at), f"timing {peer.name}"
            self.timed[key] = _times_as_long(self.context, one, self.reference, GLANCE, title)
        return self.timed[key] * plan.num_steps / self.tuning.reference
