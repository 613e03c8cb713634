"""Captioned digits: an MM-DiT that draws what a few words say, and exits on its stream of pictures.

    dyndit quickstart --family mmdit                                   # all of it
    dyndit train mmdit --out runs/mmdit                                # the backbone alone
    dyndit distill mmdit --model runs/mmdit --out runs/mmdit-exits     # the exits alone
    dyndit sample runs/mmdit --prompt "number seven, bold, tilted" --out runs/sevens

The pictures are scikit-learn's scans, made bold, tilted or small as their captions say. The model embeds the words
itself; `dyndit train mmdit --text-encoder FOLDER` takes frozen features of a text encoder in their place. Quality and
cost are in docs/family.md.
"""

from dyndit.analysis.compare.experiment import Experiment
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.exits import ExitConfig
from dyndit.models.mmdit import MMDiTConfig
from dyndit.process import RectifiedFlow
from dyndit.training.captioned import PROMPTS, VOCABULARY
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train

train = Train(
    backbone=MMDiTConfig(
        image_size=8,
        patch_size=2,
        in_channels=1,
        width=64,
        num_blocks=8,
        num_heads=2,
        text_width=32,
        pooled_width=32,
        text_length=6,
        vocabulary=VOCABULARY,
        prompts=PROMPTS,
    ),
    data="captioned-digits",
    process=RectifiedFlow(),
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
    data="captioned-digits",
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
    model="",
    data="captioned-digits",
    extractor="digits",
    train=train,
    distill=distill,
    calibration=CalibrationSettings(num_pictures=160, num_bands=10, batch_size=80, num_depths=4),
    calibration_solver="flow-euler",
    full_steps=(3, 4, 5, 6, 8, 10, 14),
    dynamic_steps=(10,),
    budgets=(0.35, 0.5, 0.65, 0.8),
    solvers=("flow-euler",),
    num_blocks=5,
    num_images=320,
    batch_size=80,
)
