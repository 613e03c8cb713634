"""The claim of docs/results/claim/protocol.md: one calibration, its searched plan, and every rival tuned beside it.

    python -m dyndit.recipes.studies.claim --number 0 --model WEIGHTS --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim/0                        # resumable
    python -m dyndit.recipes.studies.claim ... --minutes 60 --updates 2000                         # resumable

Run the first command for the numbers 0 to 4: exits, the scale of full depth, the table, the plan. Then run the second
for each, with the minutes of the longest of the five: rivals are trained and tuned for as long, and every arm is drawn
and scored. WEIGHTS is a backbone of the recipe `cifar10`'s shape. Depths are the protocol's for 12 blocks.

Result and minutes: not yet measured.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from dyndit import files
from dyndit.analysis.compare.evolution import Evolution
from dyndit.analysis.compare.experiment import Experiment, Inputs, Variant
from dyndit.analysis.compare.peers import PeerSettings, grid
from dyndit.analysis.compare.peers.constant_exit import ConstantExit
from dyndit.analysis.compare.peers.faster_cache import FasterCache
from dyndit.analysis.compare.peers.first_block_cache import FirstBlockCache
from dyndit.analysis.compare.peers.forecast import Forecast
from dyndit.analysis.compare.peers.internal_guidance import InternalGuidance
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.analysis.compare.peers.mag_cache import MagCache
from dyndit.analysis.compare.peers.pruned import Pruned
from dyndit.analysis.compare.peers.student import Student
from dyndit.analysis.compare.peers.taylorseer import TaylorSeer
from dyndit.analysis.compare.run import compare, prepared
from dyndit.analysis.compare.tuned import TUNING, choose
from dyndit.analysis.compare.tuning import Tuning
from dyndit.plans.step import Guide, OwnExit, Unconditional, locked
from dyndit.recipes.cifar10_frontier import CHOICES
from dyndit.recipes.cifar10_frontier import experiment as frontier

SOLVER, STEPS, BUDGET = "unipc", 20, 0.45
LEAST_SCALE = 1.25
"""Scale of plans if full depth does best without guidance: a plan of scale 1 has nothing to guide."""
SCALES = (1.0, LEAST_SCALE, 1.5, 1.75, 2.0, 2.5, 3.0)
EXITS, MOST_STEPS = (2, 4, 6, 8), tuple(range(6, 41))

FULL = GuidanceInterval(0.0, math.inf)
CACHES: dict[str, tuple[PeerSettings, ...]] = {
    "J-faster-cache": grid(FasterCache, uncond=(2, 3, 5), attention=(1, 2), below=(641, 901)),
    "J-taylorseer": grid(TaylorSeer, interval=(2, 3, 4), order=(1, 2), what=("modules", "output")),
    "J-mag-cache": grid(MagCache, threshold=(0.03, 0.06, 0.12, 0.24)),
    "J-first-block-cache": grid(FirstBlockCache, threshold=(0.05, 0.1, 0.2, 0.3, 0.5)),
    "J-forecast": grid(Forecast, every=(2, 3, 4), depth=EXITS[:3], along=("step", "snr")),
}

calibration = replace(
    frontier,
    calibration=replace(frontier.calibration, num_pictures=256, batch_size=64),
    points=((SOLVER, STEPS),),
    full_points=((SOLVER, STEPS),),
    unguided_points=((SOLVER, STEPS),),
    budgets=(BUDGET,),
    peers=(),
    metrics=("fd", "kid", "prc"),
    more_extractors=("vgg-cifar10", "efficientnet-lite0"),
    first_seed=10_000,
    num_blocks=1,
    num_images=5_000,
    batch_size=50,
)
"""Calibration 0 with the searched plan alone."""


def tuning(family: str, *peers: PeerSettings, **choices: object) -> Tuning:
    """Return a tuning at the plan's time."""
    return Tuning(family, peers, solver=SOLVER, share=BUDGET, reference=STEPS, **choices)


FULL_SCALE = Tuning("A", (FULL,), SCALES, SOLVER, (STEPS,))
OWN_GUIDE = tuning(
    "C",
    *grid(InternalGuidance, exit=EXITS, own=(0.0,), low=(0.0, 0.5), high=(math.inf, 17.0)),
    scales=SCALES[1:],
    steps=MOST_STEPS,
    timed=True,
)


def tunings(scale: float, minutes: float) -> Iterator[Tuning]:
    """Yield every tuned arm of the protocol.  scale: of plans. Those that train, H and K, tune beyond the minutes."""
    most, limit = {"steps": MOST_STEPS, "minutes": minutes}, {"minutes": minutes}
    yield FULL_SCALE
    yield tuning("B", FULL, scales=SCALES, steps=tuple(range(6, 21)), counts=0, **limit)
    yield OWN_GUIDE
    beside = grid(InternalGuidance, exit=EXITS, own=(1.25, 1.5, 2.0))
    yield tuning("C-pass", *beside, scales=(1.25, 1.5, 2.0), **most)
    intervals = grid(GuidanceInterval, low=(0.0, 0.2, 0.5, 1.0), high=(5.0, 10.0, 17.0, 40.0, math.inf))
    yield tuning("C-interval", *intervals, scales=SCALES[1:], **most)
    yield tuning("D", ConstantExit(8, 4), scales=SCALES[1:], counts=3, **most)
    yield tuning("H", *grid(Student, depth=(4, 5, 6), passes=(True, False)), scales=SCALES, steps=MOST_STEPS)
    yield tuning("K", *grid(Pruned, drop=(4, 6, 8)), scales=SCALES, steps=MOST_STEPS)
    for family, peers in CACHES.items():
        yield tuning(family, *peers, scales=(scale,), steps=tuple(range(6, 21)), **limit)


def locks(chosen: Experiment, guide: int) -> Iterator[Variant]:
    """Yield E1 and E2: searches with locked guidance.  guide: the exit that C took."""
    for name, lock, steps in (("E1", Unconditional(12), 14), ("E2", OwnExit(guide), STEPS)):
        yield Variant(
            name,
            calibration=replace(chosen.calibration, **of_choices(lock)),
            whole=isinstance(lock, Unconditional),
            points=((SOLVER, steps),),
            budgets=(round(BUDGET * STEPS / steps, 3),),
        )


def of_choices(lock: Guide) -> dict[str, object]:
    """Return the choices of a locked calibration. Forecasts have ages if one is left."""
    choices = locked(CHOICES, lock)
    return {"choices": choices, "forecast_ages": 2 * any(choice.forecast for choice in choices)}


@dataclass(frozen=True)
class Protocol:
    """What the page fixes: what each calibration is, the effort of ECAD, and every grid.

    thinned: takes the settings to try from a tuning of the page; here all. A rehearsal replaces each of the three.
    """

    calibration: Experiment = calibration
    evolution: Evolution = Evolution(generations=1_000)
    thinned: Callable[[Tuning], Tuning] = lambda tuning: tuning

    def compared(self, number: int, scale: float, guide: int, minutes: float, updates: int) -> Experiment:
        """Return all arms of a calibration.  updates: of each backbone that is trained, to fill a third of `minutes`."""
        chosen = replace(self.calibration, cfg_scale=scale, shuffle_seeds=(0,)).calibrated(number)
        return replace(
            chosen,
            tunings=tuple(map(self.thinned, tunings(scale, minutes))),
            variants=tuple(locks(chosen, guide)),
            evolution=replace(self.evolution, minutes=minutes, seed=number),
            peer_fit=replace(chosen.distill.fit, steps=updates),
        )


def carry_out(
    number: int, inputs: Inputs, out: Path, minutes: float = 0.0, updates: int = 2_000, protocol: Protocol | None = None
) -> Path:
    """Calibrate; with `minutes`, also tune every rival, and draw and score all arms. Return the folder to look at."""
    protocol = protocol or Protocol()
    first = protocol.calibration.calibrated(number)
    with prepared(first, out / "scale", inputs) as context, first.autocast(context.model.device.type):
        scale = max(LEAST_SCALE, choose(context, protocol.thinned(FULL_SCALE)).plan.cfg_scale)
        guide = choose(context, protocol.thinned(OWN_GUIDE)).peer.exit
    planned, inputs = replace(first, cfg_scale=scale), replace(inputs, model=str(out / "scale" / "model"))
    with prepared(planned, out / "plan", inputs) as context, planned.autocast(context.model.device.type):
        ((_, plan, file),) = context.searched(SOLVER, STEPS, (BUDGET,))
    print(f"calibration {number}: scale {scale:g}, guide e{guide}\n{plan}")
    if not minutes:
        return out / "plan"
    arms, inputs = (
        protocol.compared(number, scale, guide, minutes, updates),
        replace(inputs, model=str(out / "plan" / "model")),
    )
    with prepared(arms, out / "compare", inputs) as context:
        for stored in (out / "scale" / TUNING, out / "plan" / file):  # chosen once, so the same in every stage
            if not (place := context.out / stored.name).exists():
                files.copy(stored, place)
        compare(context)
    return out / "compare" / "report.html"


def main(
    number: int,
    model: str,
    data: str,
    extractor_weights: Path,
    out: Path,
    minutes: float = 0.0,
    updates: int = 2_000,
    device: str = "auto",
) -> None:
    """Calibrate; with `minutes`, also tune every rival, and draw and score all arms."""
    inputs = Inputs(model=model, data=data, extractor_weights=extractor_weights, device=device)
    print(carry_out(number, inputs, out, minutes, updates))


if __name__ == "__main__":
    tyro.cli(main)
