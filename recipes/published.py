"""The published DiT's training: any of its cards, on latents of ImageNet or of your own pictures.

    dyndit train published --model DiT-B/4 --data DIR --vae FOLDER --out runs/dit-b4
    dyndit train --model DiT-XL/2 --image-size 256 --data-path DIR --epochs 1400 --results-dir runs/dit-xl2 --vae ema

DIR holds a subfolder of pictures per class; `--num-classes` says how many if they are not 1,000. AdamW at 1e-4 without
decay, batches of 256, an average of decay 0.9999. 7 million steps are the 1,400 epochs of the published models.

Measured: nothing yet; a training of this size takes days on many GPUs.
"""

from dyndit.models.dit import CARDS
from dyndit.training.config import FitConfig
from dyndit.training.train import Train

train = Train(
    backbone=CARDS["DiT-XL/2"],
    fit=FitConfig(
        steps=7_000_000,
        batch_size=256,
        learning_rate=1e-4,
        ema_decay=0.9999,
        grad_clip=0.0,
        log_every=100,
        checkpoint_every=50_000,
        num_workers=4,
        seed=0,
    ),
)
