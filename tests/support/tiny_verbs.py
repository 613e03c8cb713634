"""Every verb that goes on where it was killed, made so small that it runs in a fraction of a second."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dyndit.cli import models, pictures, plans, results
from dyndit.locks import LOCK
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.seals import SEAL

RECIPE = """
from dyndit.analysis.compare.experiment import Experiment
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.dit import DiTConfig
from dyndit.models.exits import ExitConfig
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train

tiny = DiTConfig(8, 4, 1, width=16, num_blocks=2, num_heads=1, num_classes=10)
often = dict(learning_rate=3e-3, ema_decay=0.9, log_every=1, checkpoint_every=1, keep_checkpoints=1)
train = Train(tiny, FitConfig(2, 8, **often), "digits")
distill = Distill(ExitConfig(head="adaln-linear"), FitConfig(1, 8, **often), "digits")
quickstart = experiment = Experiment(
    model="", data="digits", extractor="digits", train=train, distill=distill,
    calibration=CalibrationSettings(num_pictures=70, num_bands=1, batch_size=35, num_depths=1), calibration_steps=2,
    full_steps=(1, 2), dynamic_steps=(2,), budgets=(0.9,), solvers=("ddim",),
    num_blocks=2, num_images=70, batch_size=70,
)
"""

TIMES = ["ms_per_picture", "ms_denoiser", "peak_memory_mib", SEAL]
"""Columns of runs.csv that differ from run to run; the checksum is also of the times."""


def fixed_cost(model: object, *, batch_size: int, num_blocks: int = 2, **_: object) -> CostModel:
    """Times that do not depend on the machine. Plans then depend on the seeds alone."""
    times = PartTimes(1e-3, 1e-3, 1e-3, 1e-3)
    return CostModel(batch_size, num_blocks, times, times, 1e-3)


class TinyVerbs:
    """Runs of the verbs into a folder of choice, on inputs in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe = root, root / "recipe.py"
        self.recipe.write_text(RECIPE)
        self.train(root / "backbone")
        self.distill(root / "model")
        pictures.sample(str(root / "model"), root / "samples", num_images=70, steps=1)
        self.evaluate(root / "evaluated")

    def work(self, verb: str, out: Path) -> Callable[[], None]:
        """Return the function that runs a verb into `out`, or goes on there."""
        return lambda: getattr(self, verb)(out)

    def train(self, out: Path) -> None:
        models.train(str(self.recipe), out)

    def distill(self, out: Path) -> None:
        models.distill(str(self.recipe), str(self.root / "backbone"), out)

    def calibrate(self, out: Path) -> None:
        if not out.exists():
            copy = out.with_name(f"copy-{out.name}")  # a kill may strike while the test copies
            shutil.copytree(self.root / "model", copy, dirs_exist_ok=True).rename(out)
        small = {"num_pictures": 70, "batch_size": 35, "table_steps": 2, "num_bands": 1, "num_depths": 1}
        plans.calibrate(out, budget=0.9, steps=2, **small)

    def sample(self, out: Path) -> None:
        pictures.sample(str(self.root / "model"), out, num_images=4, batch_size=2, steps=1)

    def evaluate(self, out: Path) -> None:
        chosen = {"extractor": "digits", "metrics": ("fd",), "cache": out / "cache"}
        results.evaluate(self.root / "samples", "digits", out=out / "run", **chosen)

    def convert(self, out: Path) -> None:
        if not (out / "model").exists():  # else the kill struck when all was whole
            models.convert(str(self.root / "model"), out / "model", to="diffusers")

    def report(self, out: Path) -> None:
        results.report((self.root / "evaluated" / "run",), out=out)

    def compare(self, out: Path) -> None:
        results.compare(str(self.recipe), out / "run", from_scratch=True)

    def quickstart(self, out: Path) -> None:
        results.quickstart(out=out / "run", from_scratch=True)


def left(folder: Path) -> dict[str, object]:
    """Return what a run left, by file: bytes, but for dates and times and what is drawn from these.

    The lock file of a killed holder does not count: nobody holds it, and it may stay in a folder within the run's.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name != LOCK and "tensorboard" not in name:
            found[name] = path.read_bytes()
            drawn = path.suffix in (".svg", ".md", ".html") or (path.parent.name == "run" and path.suffix == ".png")
            if drawn or path.name.endswith(("manifest.json", "report.json")):
                found[name] = "there"
            elif path.name == "trainings.csv":
                found[name] = pd.read_csv(path).drop(columns=["seconds", SEAL]).to_csv()
            elif path.name == "runs.csv":
                found[name] = pd.read_csv(io.BytesIO(path.read_bytes())).drop(columns=TIMES).to_csv()
    return found
