"""Describe a comparison: the choices that a recipe makes. `run.run` carries it out."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from dyndit.analysis.compare.evolution import Evolution
from dyndit.analysis.compare.peers import PeerSettings
from dyndit.analysis.compare.peers.confidence import ConfidenceSettings
from dyndit.analysis.compare.tuning import Tuning
from dyndit.calibration.calibrate import STEP_GRID
from dyndit.calibration.extractor import SEPARATOR
from dyndit.calibration.measure import CalibrationSettings
from dyndit.errors import InputError, expected_one_of
from dyndit.plans.descent import Descent
from dyndit.process import Process
from dyndit.training.config import FitConfig
from dyndit.training.data import PACKAGED, Pictures
from dyndit.training.distill import Distill
from dyndit.training.train import Train

SEED_STRIDE = 1_000
"""Distance between the seeds of two calibrations: a calibration also uses the two seeds after its own."""


@dataclass(frozen=True)
class Controls:
    """Fixed schedules that compete with the searched plan at equal time, at one solver and step count.

    The predicted time of each constant depth is a budget for a searched plan and its controls: its reversal,
    `num_shuffled` random orders of its steps, and the `num_ramps` ramps closest below the budget.
    """

    solver: str = "ddim"
    steps: int = 10
    depths: tuple[int, ...] = ()
    num_ramps: int = 10
    num_shuffled: int = 0


@dataclass(frozen=True)
class Variant:
    """An ablation: plans made with other settings and measured beside the comparison's own plans.

    Its arms have the family "searched-NAME". A variant with another backbone adds "full-NAME": that backbone at full
    depth. A field left as None is inherited from the experiment. The calibration's solver, steps and scale test a table
    away from its calibration. train: trains another backbone from scratch, with exits if this recipe says so.
    extractor: joins several of the comparison's extractors to calibrate by, such as "resnet20-cifar10+vgg-cifar10".
    """

    name: str
    distill: Distill | None = None
    calibration: CalibrationSettings | None = None
    calibration_solver: str | None = None
    calibration_steps: int | None = None
    calibration_cfg_scale: float | None = None
    refinements: int | None = None
    descent: Descent | None = None
    extractor: str | None = None
    whole: bool | None = None
    points: tuple[tuple[str, int], ...] | None = None
    budgets: tuple[float, ...] | None = None
    train: Train | None = None

    def applied(self, experiment: "Experiment") -> "Experiment":
        """Return the experiment with this variant's choices."""
        own = {name: value for name, value in vars(self).items() if name != "name"}
        return replace(experiment, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class GuidanceSweep:
    """Guidance scales to run full depth at, for one solver and step count, and ways to guide.

    exits: depths of exits that guide in place of the unconditional pass (Internal Guidance, arXiv:2512.24176).
    intervals: noise levels (low, high] to guide at (arXiv:2404.07724). The report draws quality over the scale.
    """

    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    solver: str = "ddim"
    steps: int = 20
    exits: tuple[int, ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Experiment:
    """The arms to compare and the number of pictures. Calibration has its own seed."""

    model: str
    data: str
    extractor: str
    distill: Distill
    train: Train | None = None
    """Recipe to train the backbone from scratch, if the user asks for that."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    calibration_solver: str = "ddim"
    calibration_steps: int = 10
    calibration_cfg_scale: float | None = None
    """None: `cfg_scale`. Another scale tests the table under a guidance that it was not measured with."""
    refinements: int = 0
    """Rounds that measure a searched plan and correct the prediction with the result (`plans.refined`)."""
    descent: Descent | None = None
    """Measured descent from each searched plan, on pictures of its own (`plans.descent`); None: none."""
    whole: bool = True
    """Let searched plans take the original model's own step; False: the calibration's choices alone."""
    shuffle_seeds: tuple[int, ...] = ()
    """Random orders of every searched plan's steps, an arm each."""
    num_calibrations: int = 1
    """Independent calibrations: each distils exits, measures a table and searches plans with seeds of its own. Of
    several the report gives intervals over calibrations: they also hold the luck of a calibration."""
    number: int = 0
    """Number of this calibration, if each has a run of its own (`calibrated`)."""
    search_seed: int = 0
    """Seed of the search's random restarts."""
    solvers: tuple[str, ...] = ("ddim", "unipc")
    """Empty, as `calibration_solver` may be: the usual solver of the model's process."""
    full_solvers: tuple[str, ...] = ()
    """More solvers, run at full depth only: plans must also beat a better solver."""
    full_steps: tuple[int, ...] = (5, 6, 7, 8, 10, 12, 14, 17, 20)
    dynamic_steps: tuple[int, ...] = (10, 20)
    points: tuple[tuple[str, int], ...] = ()
    """(solver, steps) of plans and peers; empty: every solver at each of `dynamic_steps` or `peer_steps`."""
    full_points: tuple[tuple[str, int], ...] = ()
    """(solver, steps) of full depth; empty: every solver at each of `full_steps`."""
    unguided_points: tuple[tuple[str, int], ...] = ()
    """(solver, steps) of full depth without guidance; empty: every solver at each of `unguided_steps`."""
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    latency_budgets: tuple[float, ...] = ()
    """Shares of full depth's time at `latency_reference_steps`. Each share gets a plan with a chosen step count."""
    latency_reference_steps: int = 20
    latency_steps: tuple[int, ...] = STEP_GRID
    """Step counts to choose from. The chosen plans are arms of the family "chosen"."""
    unguided_steps: tuple[int, ...] = ()
    """Step counts of full depth without guidance: a plan may save time by depth or by dropping guidance."""
    guidance: GuidanceSweep | None = None
    """Sweep of the guidance scale; None: `cfg_scale` alone."""
    controls: Controls | None = None
    variants: tuple[Variant, ...] = ()
    """Other ways to make exits and plans, each searched at every solver, step count and budget."""
    confidence: ConfidenceSettings | None = None
    """A confidence router at every solver, dynamic step count and error target; None: no such router."""
    peers: tuple[PeerSettings, ...] = ()
    """Alternatives to dynamic depth (`dyndit.analysis.compare.peers`), at every solver and `peer_steps`."""
    peer_steps: tuple[int, ...] = (10,)
    peer_fit: FitConfig | None = None
    """Training of the peers that train; None: the exits' own, so that both cost the same."""
    evolution: Evolution | None = None
    """Schedules of cached parts, evolved at every solver, step count and budget; None: no such arms."""
    tunings: tuple[Tuning, ...] = ()
    """Rivals whose settings are chosen on the calibration seeds."""
    cfg_scale: float = 1.5
    metrics: tuple[str, ...] = ("fd", "kid", "prc")
    """Metrics of `evaluate` for every arm and block: "fd", and any of "kid", "is", "prc" (precision and recall)."""
    prc_members: int = 0
    """Real pictures that precision and recall take; 0: all. Their cost grows with the square."""
    more_extractors: tuple[str, ...] = ()
    """More extractors that score the same pictures; no plan is chosen with them."""
    first_seed: int = 0
    """Seed of the first block of pictures to score; the others count up from it."""
    num_blocks: int = 5
    num_images: int = 600
    batch_size: int = 100
    time_batch: int = 0
    """Also time every arm in batches of this size; 0: in the batches that are scored alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: run the networks of all arms, peers too, under autocast. Extractors never run under autocast."""
    margin: float = 0.05
    """Non-inferiority margin, as a share of full depth's Fréchet distance."""

    @property
    def full_depth_points(self) -> tuple[tuple[str, int], ...]:
        """Return the pairs (solver, steps) that full depth runs at."""
        return self.full_points or tuple(product((*self.solvers, *self.full_solvers), self.full_steps))

    @property
    def dynamic_points(self) -> tuple[tuple[str, int], ...]:
        """Return the pairs (solver, steps) that plans are searched at."""
        return self.points or tuple(product(self.solvers, self.dynamic_steps))

    @property
    def peer_points(self) -> tuple[tuple[str, int], ...]:
        """Return the pairs (solver, steps) that peers run at."""
        return self.points or tuple(product(self.solvers, self.peer_steps))

    @property
    def peer_budget(self) -> FitConfig:
        """Return the training of the peers that train."""
        return self.peer_fit or self.distill.fit

    def check_extractors(self) -> None:
        """Refuse a variant of extractors that the comparison does not have. Raises InputError."""
        there = [name for name in (self.extractor, *self.more_extractors) if SEPARATOR not in name]
        for variant in self.variants:
            for name in [] if variant.extractor is None else variant.extractor.split(SEPARATOR):
                if name not in there:
                    raise InputError(f"variant {variant.name}: extractor '{name}', {expected_one_of(name, there)}")

    def fitted(self, process: Process, guided: bool) -> "Experiment":
        """Fill in the choices that the recipe leaves to the model. A model that cannot be guided is not guided."""
        usual = process.usual_solver
        found = replace(self, solvers=self.solvers or (usual,), calibration_solver=self.calibration_solver or usual)
        return found if guided else replace(found, cfg_scale=1.0, unguided_steps=(), unguided_points=())

    def calibrated(self, number: int) -> "Experiment":
        """Return the experiment of calibration `number`, with other seeds of everything, and without controls.

        In a run of its own it is scored on other pictures. Calibrations within one run share the run's pictures.
        """
        fit = replace(self.distill.fit, seed=self.distill.fit.seed + number * SEED_STRIDE)
        return replace(
            self,
            number=self.number + number,
            distill=replace(self.distill, fit=fit),
            calibration=replace(self.calibration, seed=self.calibration.seed + number * SEED_STRIDE),
            search_seed=self.search_seed + number,
            shuffle_seeds=tuple(seed + number for seed in self.shuffle_seeds),
            evolution=self.evolution and replace(self.evolution, seed=self.evolution.seed + number),
            first_seed=self.first_seed + number,
            controls=None,
        )

    def in_precision(self, precision: Literal["fp32", "bf16"]) -> "Experiment":
        """Return the experiment with sampling and every training in a precision."""
        variants = tuple(
            replace(one, distill=one.distill and one.distill.in_precision(precision), train=_in(one.train, precision))
            for one in self.variants
        )
        return replace(
            self,
            precision=precision,
            distill=self.distill.in_precision(precision),
            train=_in(self.train, precision),
            peer_fit=self.peer_fit and replace(self.peer_fit, precision=precision),
            variants=variants,
        )

    def autocast(self, device: str) -> AbstractContextManager:
        """Return the context that sets the sampling precision."""
        halved = self.precision == "bf16"
        return torch.autocast(torch.device(device).type, torch.bfloat16) if halved else nullcontext()


def _in(train: Train | None, precision: Literal["fp32", "bf16"]) -> Train | None:
    return train and replace(train, fit=replace(train.fit, precision=precision))


@dataclass(frozen=True)
class Inputs:
    """The user's replacements for the experiment's own choices."""

    model: str = ""
    process: str = ""
    """Diffusion process of a model that does not name its own."""
    num_heads: int | None = None
    """Attention heads of a .pt whose width does not tell them."""
    weights: str | None = None
    """Key of the weights in a training checkpoint; None: its moving average."""
    data: str = ""
    extractor: str = ""
    extractor_weights: Path | None = None
    num_images: int | None = None
    """Pictures in a seed block."""
    vae: Path | None = None
    """Autoencoder of a model of latents; None: the one beside the model."""
    from_scratch: bool = False
    device: str = "auto"

    def applied(self, experiment: Experiment) -> Experiment:
        """Return the experiment with these choices. Raises InputError: nobody chose a model, or pictures."""
        own = {name: getattr(self, name) for name in ("model", "data", "extractor", "num_images")}
        chosen = replace(experiment, **{name: value for name, value in own.items() if value})
        if not chosen.data:
            raise InputError(f"--data: missing; expected a folder of pictures, or one of {', '.join(PACKAGED)}")
        if not (chosen.model or self.from_scratch):
            raise InputError("--model: missing; expected a checkpoint, or --from-scratch if the recipe trains one")
        return chosen


def settings_of(experiment: Experiment, inputs: Inputs, data: Pictures) -> dict[str, object]:
    """Return the settings that identify a run."""
    choices = asdict(experiment)
    for chosen, owner in ((experiment, choices), *zip(experiment.variants, choices["variants"], strict=True)):
        if chosen.calibration is not None:  # write steps as text: their fields do not show the kind of guide
            owner["calibration"]["choices"] = list(map(str, chosen.calibration.choices))
        if chosen.train is not None:
            owner["train"]["process"] = chosen.train.process.config()  # without its tables
    for chosen, owner in ((experiment, choices), *zip(experiment.tunings, choices["tunings"], strict=True)):
        owner["peers"] = [{"peer": peer.name, **_plain(peer)} for peer in chosen.peers]
    return {"experiment": _without_trackers(choices), "inputs": asdict(inputs), "data": data.fingerprint}


def _plain(peer: PeerSettings) -> dict[str, object]:
    """Return a peer's settings as JSON holds them: infinity as text."""
    return {name: str(value) if value == math.inf else value for name, value in asdict(peer).items()}


def _without_trackers(choices: object) -> object:
    """Return the choices without those of a tracker, which change nothing."""
    if isinstance(choices, dict):
        return {name: _without_trackers(value) for name, value in choices.items() if name != "tracker"}
    return type(choices)(map(_without_trackers, choices)) if isinstance(choices, list | tuple) else choices
