"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from dyndit import bounds
from dyndit.errors import InputError, expected_one_of

Tracker = Literal["tensorboard", "wandb", "none"]
"""Where the losses go besides losses.csv and the terminal."""


@dataclass(frozen=True)
class FitConfig:
    """Set up the training loop: `dyndit.FitConfig(steps=1_000, batch_size=64, learning_rate=1e-3)`.

    steps: updates of the weights; each is over all micro-batches and processes.
    batch_size: pictures per step, over all micro-batches and all processes together.
    learning_rate, weight_decay, betas: of AdamW.
    warmup_steps: steps in which the learning rate rises linearly from 0.
    schedule: the learning rate after the warm-up: "constant", or "cosine", which ends at 0.
    grad_clip: largest norm of the whole gradient; 0: no clipping.
    accumulation: micro-batches per step.
    precision: "fp32", or "bf16": autocast; weights, EMA and optimizer stay fp32.
    ema_decay: decay of the averaged weights; step s uses min(decay, (1 + s) / (10 + s)).
    seed: of the pictures' order, the noise and the timesteps.
    log_every: log the losses after every so many steps.
    checkpoint_every: write a checkpoint after every so many steps. keep_checkpoints: how many stay.
    sample_every: draw a sample grid after every so many steps; 0: never.
    gradient_checkpointing: hold fewer activations, and compute them again. The module's builder switches it on.
    flip: mirror half of the pictures, if the data allow it.
    num_workers: processes that read pictures; 0: this one.
    compile: compile the module.
    tracker: where the losses go besides losses.csv: "tensorboard", "wandb" (`pip install "dyndit[wandb]"`) or "none".
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = 1.0
    accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: float = 0.9999
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    sample_every: int = 0
    gradient_checkpointing: bool = False
    flip: bool = True
    num_workers: int = 0
    compile: bool = False
    tracker: Tracker = field(default="tensorboard", repr=False)

    def __post_init__(self):
        for name, value in vars(self).items():
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, int | float) and not isinstance(each, bool) and not bounds.is_number(each):
                    raise InputError(f"{name}: found {each}, expected a finite number")
                if name in bounds.BOUNDS and not bounds.BOUNDS[name].holds(each):
                    raise InputError(f"{name}: found {each}, expected {bounds.BOUNDS[name]}")
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("warmup_steps", "sample_every", "num_workers", "grad_clip", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 0")
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"schedule: found {self.schedule!r}, expected 'constant' or 'cosine'")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision: found {self.precision!r}, expected 'fp32' or 'bf16'")
        if self.tracker not in get_args(Tracker):
            raise InputError(f"tracker {self.tracker!r:.40}: {expected_one_of(self.tracker, get_args(Tracker))}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay: found {self.ema_decay}, expected at least 0 and below 1")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, .... The schedule has no state."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))


# These fields do not change the final weights, so they may differ when a run is resumed.
BOOKKEEPING = {"log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "num_workers", "tracker"}
