"""The claim of docs/results/claim/protocol.md: one calibration, its searched plan, and every rival tuned beside it.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    python -m dyndit.recipes.studies.claim --number 0 --part plans --model WEIGHTS --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim/0                        # resumable
    python -m dyndit.recipes.studies.claim --number 0 --part rivals ...                            # resumable
    dyndit report runs/claim --margin 0.03

Run both parts for the numbers 0 to 4. Each calibrates, unless its folder holds the calibration: exits, the scale of
full depth, the table, the plan. Its arms train and are tuned for as many minutes as that took. They are drawn in turns
with the plan, scored, and timed in batches of 1. The report joins the parts, which may come from different machines.
WEIGHTS is a backbone of the recipe `cifar10`'s shape; `--protocol unipc-10` and `flow` are the replications. Depths are
the protocol's for 12 blocks.

Result and minutes: not yet measured.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pandas as pd
import tyro

from dyndit import files
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.costs import COSTS, note
from dyndit.analysis.compare.evolution import Evolution
from dyndit.analysis.compare.experiment import Experiment, Inputs, Variant
from dyndit.analysis.compare.peers import PeerContext, PeerSettings, grid
from dyndit.analysis.compare.peers.constant_exit import ConstantExit
from dyndit.analysis.compare.peers.faster_cache import FasterCache
from dyndit.analysis.compare.peers.first_block_cache import FirstBlockCache
from dyndit.analysis.compare.peers.forecast import Forecast
from dyndit.analysis.compare.peers.internal_guidance import InternalGuidance
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.analysis.compare.peers.mag_cache import MagCache
from dyndit.analysis.compare.peers.pruned import Pruned
from dyndit.analysis.compare.peers.skips import Skips
from dyndit.analysis.compare.peers.student import Student
from dyndit.analysis.compare.peers.taylorseer import TaylorSeer
from dyndit.analysis.compare.peers.width import Width
from dyndit.analysis.compare.run import compare, prepared
from dyndit.analysis.compare.tuned import TUNING, choose
from dyndit.analysis.compare.tuning import Tuning
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig
from dyndit.plans.plan import file_name
from dyndit.plans.step import Guide, OwnExit, Unconditional, locked
from dyndit.recipes.cifar10_frontier import experiment as frontier

LEAST_SCALE = 1.5
"""Scale of plans if full depth does best without guidance: a plan of scale 1 has nothing to guide."""
SCALES = (1.0, LEAST_SCALE, 2.0, 2.5, 3.0)
EXITS, RECALL = (2, 4, 6, 8), (2,)
"""Depths of the exits, all that plans leave at or are guided by, and of those with learned forecasts."""
CHOICES = ("12|e4", "12|e4*2", "8|4", "8|e4*2", "6|e2", "4|e2", "2+|held", "2+|held*1.4")
AGES = 2
"""Steps of the table, each two of the plan's, for which a forecast is measured."""

STUDENTS, TIMED, EFFORT = (4, 5, 6), 100, "effort.json"
"""Blocks of the students; updates to time; file of how many a training has."""
Part = Literal["plans", "rivals"]
"""What a run holds: the arms that run G's backbone and exits, or those that train or cache."""
FULL = GuidanceInterval(0.0, math.inf)
CACHES: dict[str, tuple[PeerSettings, ...]] = {
    "J-faster-cache": grid(FasterCache, uncond=(2, 3, 5), attention=(1, 2), below=(641, 901)),
    "J-taylorseer": grid(TaylorSeer, interval=(2, 3, 4), order=(1, 2), what=("modules", "output")),
    "J-mag-cache": grid(MagCache, threshold=(0.03, 0.06, 0.12, 0.24)),
    "J-first-block-cache": grid(FirstBlockCache, threshold=(0.05, 0.1, 0.2, 0.3, 0.5)),
    "J-forecast": grid(Forecast, every=(2, 3, 4), depth=EXITS[:3], along=("step", "snr")),
}

exits = replace(
    frontier.distill,
    exits=ExitConfig(EXITS, recall=RECALL),
    forecasts=False,  # those of the choices are learned
    num_trajectories=512,
    cfg_scale=2.5,  # about what full depth takes
    fit=replace(frontier.distill.fit, steps=500, checkpoint_every=100),
    recall_fit=replace(frontier.distill.recall_fit, steps=700, precision=frontier.distill.fit.precision),
)
calibration = replace(
    frontier,
    distill=exits,
    calibration=replace(frontier.calibration, num_pictures=80, batch_size=80, choices=CHOICES, forecast_ages=AGES),
    full_points=(),
    full_steps=(),  # full depth is tuned: A
    unguided_points=(),
    unguided_steps=(),
    peers=(),
    metrics=("fd", "kid", "prc"),
    prc_members=5_000,
    more_extractors=("vgg-cifar10", "efficientnet-lite0"),
    first_seed=10_000,
    num_blocks=1,
    num_images=2_000,
    batch_size=50,
    time_batch=1,
)
"""Calibration 0, but for its point and budget."""


@dataclass(frozen=True)
class Protocol:
    """What the page fixes. A rehearsal takes less: fewer steps, other effort, thinner grids."""

    solver: str = "unipc"
    steps: int = 20
    """Of full depth and of searched plans."""
    budget: float = 0.45
    counts: tuple[int, ...] = tuple(range(6, 41))
    """Step counts of "most steps"."""
    lock_steps: int = 14
    """Steps of E1, whose passes at full depth cost more than the budget at `steps`."""
    calibration: Experiment = calibration
    evolution: Evolution = field(default_factory=lambda: Evolution(generations=1_000))
    thinned: Callable[[Tuning], Tuning] = lambda tuning: tuning
    """Changes each tuning of the page; by default to itself."""
    without: tuple[str, ...] = ()
    """Arms that a replication leaves out."""

    def calibrated(self, number: int) -> Experiment:
        """Return a calibration with the searched plan alone."""
        point = ((self.solver, self.steps),)
        return replace(self.calibration, budgets=(self.budget,), points=point).calibrated(number)

    def tuning(self, family: str, *peers: PeerSettings, **choices: object) -> Tuning:
        """Return a tuning at the plan's time."""
        chosen = {"solver": self.solver, "share": self.budget, "reference": self.steps, "matched": True} | choices
        return self.thinned(Tuning(family, peers, **chosen))

    @property
    def full_scale(self) -> Tuning:
        """Return A: the scale of full depth, without a limit of time."""
        return self.tuning("A", FULL, scales=SCALES, steps=(self.steps,), share=None, matched=False)

    @property
    def own_guide(self) -> Tuning:
        """Return C without a pass. Its grid is tried whole: E2 takes its exit."""
        settings = grid(InternalGuidance, exit=EXITS, own=(0.0,), low=(0.0, 0.5), high=(math.inf, 17.0))
        return self.tuning("C-own", *settings, scales=SCALES[1:], steps=self.counts, group="C")

    def tunings(self, scale: float, minutes: float) -> Iterator[Tuning]:
        """Yield every tuned arm.  scale: of plans. Arms that train, H, K and L, tune beyond the minutes."""
        most, limit = {"steps": self.counts, "minutes": minutes}, {"minutes": minutes}
        fewer = tuple(count for count in self.counts if count <= self.steps)
        yield self.full_scale
        yield self.tuning("B", FULL, scales=SCALES, steps=fewer, counts=0, **limit)
        yield self.own_guide
        beside = grid(InternalGuidance, exit=EXITS, own=(1.25, 1.5, 2.0))
        yield self.tuning("C-pass", *beside, scales=(1.25, 1.5, 2.0), group="C", **most)
        intervals = grid(GuidanceInterval, low=(0.0, 0.5, 1.0), high=(5.0, 17.0, math.inf))
        yield self.tuning("C-interval", *intervals, scales=SCALES[1:], **most)
        plainest = {"scales": SCALES[1:], "group": "D"} | most | {"counts": 3}
        yield self.tuning("D-constant", ConstantExit(8, 4), **plainest)
        yield self.tuning("D-skips", *grid(Skips, every=(2, 3, 4, 5), depth=RECALL[:1]), **plainest)
        yield self.tuning("H", *grid(Student, depth=STUDENTS, passes=(True, False)), scales=SCALES, steps=self.counts)
        yield self.tuning("K", *grid(Pruned, drop=(4, 6)), scales=SCALES, steps=self.counts)
        yield self.tuning("L", *grid(Width, share=(0.6,)), scales=(scale,), steps=self.counts)
        for family, peers in CACHES.items():
            yield self.tuning(family, *peers, scales=(scale,), steps=fewer, group="J", **limit)

    def locks(self, chosen: Experiment, guide: int) -> Iterator[Variant]:
        """Yield E1 and E2: searches with locked guidance.  guide: the exit that C took without a pass."""
        for name, lock, steps in (("E1", Unconditional(12), self.lock_steps), ("E2", OwnExit(guide), self.steps)):
            yield Variant(
                name,
                calibration=replace(chosen.calibration, **of_choices(lock)),
                whole=isinstance(lock, Unconditional),
                points=((self.solver, steps),),
                budgets=(round(self.budget * self.steps / steps, 3),),
            )

    def plans(self, number: int, scale: float, minutes: float, guide: int) -> Experiment:
        """Return part "plans": A to G. Nothing trains but G's exits.  guide: the exit that C took without a pass."""
        chosen = replace(self.calibrated(number), cfg_scale=scale, shuffle_seeds=(number,))
        locks = tuple(one for one in self.locks(chosen, guide) if one.name not in self.without)
        return replace(chosen, tunings=self._tunings(scale, minutes, among_rivals=False), variants=locks)

    def rivals(self, number: int, scale: float, minutes: float, updates: int) -> Experiment:
        """Return part "rivals": G, and H to L.  updates: of each training, to fill a third of `minutes`."""
        chosen = replace(self.calibrated(number), cfg_scale=scale)
        return replace(
            chosen,
            tunings=self._tunings(scale, minutes, among_rivals=True),
            evolution=replace(self.evolution, minutes=minutes, seed=number),
            peer_fit=replace(chosen.distill.fit, steps=updates),
        )

    def _tunings(self, scale: float, minutes: float, *, among_rivals: bool) -> tuple[Tuning, ...]:
        found = [one for one in self.tunings(scale, minutes) if one.family not in self.without]
        return tuple(one for one in found if ((one.group or one.family) in RIVALS) == among_rivals)


RIVALS = ("H", "J", "K", "L")
"""Tuned arms of part "rivals", beside the evolved one."""
LESS = ("E1", "E2", "K", "L")
FLOW = replace(calibration, calibration_solver="flow-euler", distill=replace(calibration.distill, solver="flow-euler"))
PROTOCOLS = {
    "main": Protocol(),
    "unipc-10": Protocol(steps=10, counts=tuple(range(3, 41)), without=LESS),
    "flow": Protocol(solver="flow-euler", calibration=FLOW, without=LESS),
}
"""The main run and its replications."""


def of_choices(lock: Guide) -> dict[str, object]:
    """Return the choices of a locked calibration. Forecasts have ages if one is left."""
    choices = locked(CHOICES, lock)
    return {"choices": choices, "forecast_ages": AGES * any(choice.forecast for choice in choices)}


def carry_out(number: int, part: Part, inputs: Inputs, out: Path, protocol: Protocol = PROTOCOLS["main"]) -> Path:
    """Calibrate, tune the arms of a part for as long, draw and score them. Return the report."""
    first = protocol.calibrated(number)
    with prepared(first, out / "scale", inputs) as context, first.autocast(context.model.device.type):
        scale = max(LEAST_SCALE, choose(context, protocol.full_scale).plan.cfg_scale)
    planned, inputs = replace(first, cfg_scale=scale), replace(inputs, model=str(out / "scale" / "model"))
    with prepared(planned, out / "plan", inputs) as context, planned.autocast(context.model.device.type):
        file = file_name(protocol.solver, protocol.steps, protocol.budget)
        _ = context.table  # which notes its own cost

        def noted(seconds: float) -> None:
            note(context.out / COSTS, {"name": "plan", "seed": first.search_seed, "seconds": seconds})

        ((_, plan, _),) = context.searched(protocol.solver, protocol.steps, (protocol.budget,), noted)
        full_ms = context.predicted_ms(context.full(protocol.solver, protocol.steps))
        minutes = math.ceil(minutes_of(out))
        copy_once(out / "scale" / TUNING, context.out)
        guide = choose(context, protocol.own_guide).peer.exit if part == "plans" else 0
        if part == "rivals":
            arms = protocol.rivals(number, scale, minutes, updates_within(context, minutes / 3, out))
        else:
            arms = protocol.plans(number, scale, minutes, guide)
    print(f"calibration {number}: scale {scale:g}, {minutes_of(out):.1f} minutes\n{plan}")
    parts = ", ".join(f"{name} {value:.0f}" for name, value in expected(protocol, arms, full_ms).items())
    print(f"to come, minutes at most: {parts}", flush=True)
    inputs, folder = replace(inputs, model=str(out / "plan" / "model")), out / f"{part}-{number}"
    with prepared(arms, folder, inputs) as context:
        for chosen in (TUNING, file):
            copy_once(out / "plan" / chosen, context.out)
        compare(context)
    return folder / "report.html"


def copy_once(path: Path, folder: Path) -> None:
    """Give a folder what an earlier stage chose, unless it has it: it may have grown there."""
    if not (place := folder / path.name).exists():
        files.copy(path, place)


def expected(protocol: Protocol, part: Experiment, full_ms: float) -> dict[str, float]:
    """Estimate the minutes of a part, at most, by stage.  full_ms: of full depth, per picture."""
    ms, size = protocol.budget * full_ms, part.calibration.num_pictures
    drawn = [
        len(one.peers) * len(one.scales) * (one.counts or len(one.steps)) * size * ms / 6e4 for one in part.tunings
    ]
    limits = [one.minutes or math.inf for one in part.tunings]
    trained = {(peer.name, getattr(peer, "depth", peer.label)) for one in part.tunings for peer in one.peers}
    trained = [peer for peer in trained if peer[0] in (Student.name, Pruned.name, Width.name)]
    minutes = 0.0 if part.evolution is None else part.evolution.minutes
    # All arms take the plan's time but A, which takes its own.
    families = {one.group or one.family for one in part.tunings}
    arms = 1 + len(part.variants) + len(families - {"A"}) + (part.evolution is not None) + len(part.shuffle_seeds)
    scored = part.num_images * (arms * ms + full_ms * ("A" in families)) / 6e4
    stages = {"trainings": len(trained) * minutes / 3, "tuning": sum(map(min, drawn, limits))}
    return stages | {"evolution": minutes, "pictures to score": scored}


def updates_within(context: Context, minutes: float, out: Path) -> int:
    """Return how many updates of the deepest student take this long. `TIMED` are timed, once for the folder."""
    if (path := out / EFFORT).exists():
        return int(files.read_json(path)["updates"])
    fit = replace(context.experiment.distill.fit, steps=TIMED)
    with TemporaryDirectory() as folder:
        began = time.monotonic()
        _ = Student(max(STUDENTS)).model(context.model, PeerContext(Path(folder), context.data, fit))
        seconds = time.monotonic() - began
    updates = max(1, round(TIMED * 60 * minutes / seconds))
    files.write_json(path, {"updates": updates, "timed": TIMED, "seconds": seconds})
    return updates


def minutes_of(out: Path) -> float:
    """Return the minutes from the backbone to the plan: exits, table, search and measured plans.

    Raises:
        InputError: a stage was stopped between its end and its row, so its time is lost.
    """
    costs = pd.concat([pd.read_csv(out / stage / COSTS) for stage in ("scale", "plan")])
    if math.isnan(seconds := float(costs["seconds"].sum(skipna=False))):
        raise InputError(f"{out}: a stage was stopped before its time was noted; expected a calibration elsewhere")
    return seconds / 60


def main(
    number: int,
    part: Part,
    model: str,
    data: str,
    extractor_weights: Path,
    out: Path,
    protocol: Literal["main", "unipc-10", "flow"] = "main",
    device: str = "auto",
) -> None:
    """Calibrate, tune the arms of a part for as long, draw and score them."""
    inputs = Inputs(model=model, data=data, extractor_weights=extractor_weights, device=device)
    print(carry_out(number, part, inputs, out, PROTOCOLS[protocol]))


if __name__ == "__main__":
    tyro.cli(main)
