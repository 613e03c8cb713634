"""Log the losses of every step to losses.csv, a tracker and the terminal."""

from __future__ import annotations

import io
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from dyndit import files
from dyndit.errors import InputError
from dyndit.progress import progress_bar
from dyndit.training.checkpoints import LOG
from dyndit.training.config import FitConfig
from dyndit.training.trackers import start_tracker


class Log:
    """Log of the losses of every step: losses.csv, the tracker, and the progress display.

    Figures stay on the device until `flush`, so that a step does not wait for them. Every checkpoint holds the log up
    to its step. A resumed run starts from that text, whatever became of losses.csv.
    """

    def __init__(self, out: Path, first: int, text: str, config: FitConfig, accelerator: Accelerator, show: bool):
        self.path, self.config, self.accelerator, self.show = out / LOG, config, accelerator, show
        self.lines = [text] if text else []
        self.rows: list[tuple[int, float, list[str], Tensor]] = []
        self.last, self.last_time = first, time.monotonic()
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            if text and not (self.path.is_file() and self.path.read_bytes() == text.encode()):
                files.write_text(self.path, text)
            elif not text:
                files.remove(self.path)

    def __enter__(self) -> Log:
        start_tracker(self.accelerator, self.config.tracker, self.path.parent)
        self.open = ExitStack()
        self.advance = self.open.enter_context(progress_bar("training", unit="steps", shown=self.show))
        self.advance(self.last, self.config.steps)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()
        for tracker in self.accelerator.trackers:  # end_training() would also end the process group
            tracker.finish()

    @property
    def text(self) -> str:
        """Return the log up to the last `flush`."""
        return "".join(self.lines)

    def read(self) -> pd.DataFrame:
        """Return the log as a table, a row per step. A log without lines gives an empty table."""
        if not self.lines:
            return pd.DataFrame()
        # Parse with Python's float: pandas 2 may be a bit off, and a resumed run must have equal losses.
        return pd.read_csv(io.StringIO(self.text), dtype=str).astype(float).astype({"step": int})

    def add(self, step: int, learning_rate: float, norm: Tensor, figures: list[dict[str, Tensor]]) -> None:
        """Add one step: the means of its micro-batches' figures."""
        names = list(figures[0])
        means = torch.stack([torch.stack([f[name].float() for name in names]) for f in figures]).mean(0)
        self.rows.append((step, learning_rate, ["grad_norm", *names], torch.cat([norm.float()[None], means])))
        if step < self.config.steps:  # `flush` shows the last
            self.advance(step, self.config.steps)

    def flush(self) -> None:
        """Write out the steps added so far. Raises InputError at the first step whose loss is not finite."""
        if not self.rows:
            return
        names = self.rows[0][2]
        reduced: Any = self.accelerator.reduce(torch.stack([row[3] for row in self.rows]), "mean")
        values = reduced.double().cpu()
        frame: Any = pd.DataFrame(values.numpy(), columns=names)
        frame.insert(0, "step", [row[0] for row in self.rows])
        frame.insert(2, "learning_rate", [row[1] for row in self.rows])
        frame = frame[["step", "loss", "learning_rate", "grad_norm", *names[2:]]]
        bad = frame[~np.isfinite(frame[["loss", "grad_norm"]]).all(axis=1)]
        if len(bad):
            row = bad.iloc[0]
            raise InputError(
                f"training: at step {int(row.step)} the loss is {row.loss:g} and its gradient's norm "
                f"{row.grad_norm:g}, expected finite numbers; try a lower learning_rate or a longer warm-up"
            )
        lines = frame.to_csv(header=not self.lines, index=False)
        if self.accelerator.is_main_process:
            files.append_lines(self.path, lines)
        self.lines.append(lines)
        self.rows.clear()
        step, now = int(frame["step"].iloc[-1]), time.monotonic()
        means = frame.drop(columns="step").mean().to_dict()
        rate = (step - self.last) / max(now - self.last_time, 1e-9)
        self.last, self.last_time = step, now
        self.accelerator.log({**means, "steps_per_second": rate}, step=step)
        self.advance(step, self.config.steps, f"loss {means['loss']:.4f}  {rate:.2f} steps/s")
