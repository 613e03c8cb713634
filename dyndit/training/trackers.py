"""Send a training's figures to TensorBoard or Weights & Biases, through accelerate."""

import importlib.util
import secrets
from pathlib import Path

from accelerate import Accelerator

from dyndit import files
from dyndit.errors import InputError
from dyndit.training.config import Tracker

RUN_ID = "wandb-id.txt"
"""File with the id of a W&B run in the folder of a training: a resumed training goes on in the same run."""


def has_wandb() -> bool:
    """Tell if wandb is installed."""
    return importlib.util.find_spec("wandb") is not None


def log_with(tracker: Tracker) -> str | None:
    """Return what `Accelerator(log_with=...)` takes. Raises InputError: the tracker is not installed."""
    if tracker == "wandb" and not has_wandb():
        raise InputError("--tracker wandb: not installed; expected `pip install 'dyndit[wandb]'`, or another tracker")
    return None if tracker == "none" else tracker


def start_tracker(accelerator: Accelerator, tracker: Tracker, out: Path) -> None:
    """Start the tracker of a run in the folder `out`. W&B: the project is "dyndit", the run has the folder's name."""
    if tracker != "wandb":
        accelerator.init_trackers("tensorboard")  # the folder of its files; without a tracker nothing starts
        return
    options = {}
    if accelerator.is_main_process:
        if not (path := out / RUN_ID).is_file():
            files.write_text(path, secrets.token_hex(8) + "\n")
        run_id = path.read_text().strip()
        options = {"name": out.resolve().name, "dir": str(out), "id": run_id, "resume": "allow"}
    accelerator.init_trackers("dyndit", init_kwargs={"wandb": options})
