"""Exits for your own checkpoint, on your own pictures: the trunk stays as it is, bit for bit.

    dyndit distill finetune_exits --model my-dit.pt --data DIR --out runs/my-exits
    dyndit calibrate runs/my-exits --budget 0.6 --steps 20 --extractor inception --reference DIR

DIR holds a subfolder of pictures per class. Copy this file to change its choices and give its path in place of
the name. Exits stand after every layer of a model of up to 16, after every fourth of a deeper one; early ones have an
MLP before their projection, without which plans on natural pictures were far worse (docs/experiments.md).
"""

from dyndit.models.exits import ExitConfig
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill

distill = Distill(
    exits=ExitConfig(head="wide"),
    fit=FitConfig(
        steps=1_000,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=25,
        schedule="cosine",
        ema_decay=0.99,
        checkpoint_every=250,
        seed=0,
    ),
)
