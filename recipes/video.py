"""Moving digits: a spatial-temporal DiT that draws clips of bouncing scans, and exits after every layer.

    dyndit quickstart --family video                                   # all of it
    dyndit train video --out runs/video                                # the backbone alone
    dyndit distill video --model runs/video --out runs/video-exits     # the exits alone
    dyndit sample runs/video --shape 16 16 24 --out runs/long          # clips of another shape

Clips are 8 frames of 16 x 16 pixels with one or two scans of their class. Half of the training batches have another
shape: wide, tall, short, or one frame, a picture. Quality and cost are in docs/family.md.
"""

from dyndit.analysis.compare.experiment import Experiment
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.exits import ExitConfig
from dyndit.models.video import VideoConfig
from dyndit.process import RectifiedFlow
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train

train = Train(
    backbone=VideoConfig(
        num_frames=8,
        image_size=16,
        patch_size=4,
        patch_frames=2,
        in_channels=1,
        width=96,
        num_blocks=8,
        num_heads=6,
        attention="full",
        rotary_base=100.0,
        num_classes=10,
    ),
    data="moving-digits",
    process=RectifiedFlow(),
    fit=FitConfig(
        steps=9_000,
        batch_size=16,
        learning_rate=6e-3,
        warmup_steps=200,
        schedule="cosine",
        ema_decay=0.998,
        seed=0,
    ),
)

distill = Distill(
    exits=ExitConfig(head="adaln-linear"),
    data="moving-digits",
    fit=FitConfig(
        steps=300,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=25,
        schedule="cosine",
        ema_decay=0.99,
        seed=1,
    ),
)

quickstart = Experiment(
    model="",
    data="moving-digits",
    extractor="moving-digits",
    train=train,
    distill=distill,
    calibration=CalibrationSettings(num_pictures=96, num_bands=5, batch_size=48, num_depths=4),
    calibration_solver="flow-euler",
    full_steps=(3, 4, 5, 6, 8, 10, 14),
    dynamic_steps=(10,),
    budgets=(0.35, 0.5, 0.65, 0.8),
    solvers=("flow-euler",),
    num_blocks=4,
    num_images=240,
    batch_size=40,
)
