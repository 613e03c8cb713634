"""scikit-learn's digits: a 12-layer class-conditional DiT on 8 x 8 pixels, and exits after every layer.

    dyndit quickstart                                                # all of it, on the backbone that ships
    dyndit quickstart --from-scratch                                 # the backbone as well
    dyndit train digits --out runs/digits                            # the backbone alone
    dyndit distill digits --model runs/digits --out runs/exits       # the exits alone

`dyndit/assets/digits.safetensors` holds the weights that `train` gives, in half precision. The quickstart takes about
6 minutes on 2 CPU cores; its report compares plans with full depth at fewer steps. The studies on digits vary `study`.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.compare.peers.faster_cache import FasterCache
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.dit import CARDS
from dyndit.models.exits import ExitConfig
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train

train = Train(
    backbone=CARDS["digits"],
    data="digits",
    fit=FitConfig(
        steps=2_500,
        batch_size=128,
        learning_rate=1e-3,
        warmup_steps=100,
        schedule="cosine",
        ema_decay=0.998,
        seed=0,
    ),
)

distill = Distill(
    exits=ExitConfig(head="adaln-linear"),
    data="digits",
    fit=FitConfig(
        steps=500,
        batch_size=128,
        learning_rate=1e-3,
        warmup_steps=25,
        schedule="cosine",
        ema_decay=0.99,
        seed=1,
    ),
)

quickstart = Experiment(
    model="digits",
    data="digits",
    extractor="digits",
    train=train,
    distill=distill,
    calibration=CalibrationSettings(num_pictures=128, num_bands=5, batch_size=64),
    full_steps=(5, 8, 10, 14, 20),
    dynamic_steps=(10,),
    budgets=(0.5, 0.65, 0.8),
    solvers=("ddim", "unipc"),
    num_blocks=5,
    num_images=120,
    batch_size=60,
)

study = replace(
    quickstart,
    calibration=CalibrationSettings(num_pictures=128, num_bands=10, batch_size=64),
    calibration_solver="unipc",
    solvers=("unipc",),
    full_steps=(4, 5, 6, 7, 8, 10, 15, 20),
    unguided_steps=(5, 10),
    dynamic_steps=(10,),
    budgets=(0.3, 0.45),
    peers=(*FasterCache.chosen(), *GuidanceInterval.chosen()),
    metrics=("fd", "kid"),
    more_extractors=("digits-lenet",),
    num_images=400,
    batch_size=50,
)
"""Two tight budgets at 10 UniPC steps; the table has a band for each step. A study says what else it changes."""
