"""What a comparison compares: the choices that a recipe makes. `comparison` runs it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from dyndit.analysis.compare.peers import PeerSettings
from dyndit.analysis.compare.peers.confidence import ConfidenceSettings
from dyndit.calibration.calibrate import STEP_GRID
from dyndit.calibration.measure import CalibrationSettings
from dyndit.training.data import Pictures
from dyndit.training.distill import Distill
from dyndit.training.train import Train


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

    name: the family of its arms is "searched-NAME"; where its backbone is another one, "full-NAME" is that backbone at
    full depth, at the experiment's points. What is None is the experiment's: distill, calibration, and what its table
    is measured with (a solver, its steps, a guidance scale), to see what a table is worth elsewhere. train: the
    backbone is trained from scratch, with its exits from the first step where this recipe says so.
    """

    name: str
    distill: Distill | None = None
    calibration: CalibrationSettings | None = None
    calibration_solver: str | None = None
    calibration_steps: int | None = None
    calibration_cfg_scale: float | None = None
    refinements: int | None = None
    train: Train | None = None

    def applied(self, experiment: "Experiment") -> "Experiment":
        """The experiment with this variant's choices."""
        own = {name: value for name, value in vars(self).items() if name != "name"}
        return replace(experiment, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class Experiment:
    """What to compare, and on how many pictures. Scoring seeds are 0, 1, ...; calibration has its own."""

    model: str
    data: str
    extractor: str
    distill: Distill
    train: Train | None = None
    """How to train the backbone from scratch, where that is asked for."""
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
    confidence: ConfidenceSettings | None = None
    """A confidence router at every solver, dynamic step count and error target; None for none."""
    peers: tuple[PeerSettings, ...] = ()
    """What else a user might pick (`dyndit.analysis.compare.peers`), at every solver and `peer_steps`."""
    peer_steps: tuple[int, ...] = (10,)
    cfg_scale: float = 1.5
    metrics: tuple[str, ...] = ("fd",)
    """Of `evaluate`, measured on every arm and block: fd, and kid, is, prc besides."""
    more_extractors: tuple[str, ...] = ()
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
class Inputs:
    """What the user may put in place of the experiment's own choices."""

    model: str = ""
    process: str = ""
    """Of a model that does not say its own."""
    data: str = ""
    extractor_weights: Path | None = None
    from_scratch: bool = False
    device: str = "auto"


def settings_of(experiment: Experiment, inputs: Inputs, data: Pictures) -> dict[str, object]:
    """What makes a run this run."""
    choices = asdict(experiment)
    for chosen, owner in ((experiment, choices), *zip(experiment.variants, choices["variants"], strict=True)):
        if chosen.calibration is not None:  # a step as its text: its fields alone do not tell the kind of guide
            owner["calibration"]["choices"] = list(map(str, chosen.calibration.choices))
        if chosen.train is not None:
            owner["train"]["process"] = chosen.train.process.config()  # without its tables
    choices["peers"] = [{"peer": peer.name, **asdict(peer)} for peer in experiment.peers]
    return {"experiment": choices, "inputs": asdict(inputs), "data": data.fingerprint}
