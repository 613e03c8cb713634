"""Compare backbones that are trained alike: on the same pictures, for the same updates, from several seeds.

train -> save -> sample at full depth -> score -> report. Every training resumes; a scored one is not done again. A row
of runs.csv is a training: its block is the training seed, so intervals are over trainings. trainings.csv has the costs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from dyndit import manifest, sealed_csv
from dyndit.analysis.compare.costs import COSTS, backbone_cost, note
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.macs import model_macs
from dyndit.analysis.metrics.quality import score
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.analysis.report import style
from dyndit.analysis.report.headline import TRAINED_ALIKE
from dyndit.analysis.report.runs import COLUMNS, RUNS, append_run, arm_name, measured, read_runs
from dyndit.analysis.report.trainings import trainings_figure
from dyndit.analysis.report.write import write_report
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures.collection import said_of
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.sampling.solvers import kind_of
from dyndit.storage import load as checkpoints
from dyndit.training.data import Pictures, open_data
from dyndit.training.losses import denoising_loss
from dyndit.training.subset import Some
from dyndit.training.train import Train

FIGURE = "trainings.png"


@dataclass(frozen=True)
class Trainings:
    """What to train and how to score it. The first recipe is what the others are compared with (family "full")."""

    recipes: Mapping[str, Train]
    data: str
    extractor: str
    num_pictures: int = 0
    """Pictures to train on, classes in turn; also the reference of the score. 0: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    solver: str = "ddim"
    steps: int = 20
    cfg_scale: float = 1.5
    num_images: int = 500
    batch_size: int = 100


def run(trainings: Trainings, out: Path, data: str = "", console: Console | None = None) -> Path:
    """Run the comparison in `out` and return `out`.  data: pictures in place of the comparison's.

    Raises:
        InputError: `out` holds another run, or the pictures do not fit.
    """
    console, out = console or Console(stderr=True), Path(out)
    pictures = open_data(data or trainings.data)
    pictures.check()
    for line in said_of(pictures.account):
        console.print(line, highlight=False)
    if trainings.num_pictures:
        pictures = Some(pictures, trainings.num_pictures)
    extractor = load_extractor(trainings.extractor)
    settings = _settings(trainings, pictures) | {"extractor": extractor.fingerprint}
    manifest.claim(out, settings, pictures=pictures.account)
    for recipe in trainings.recipes.values():
        recipe.check(pictures)
    reference = Measured(PictureSet(data or trainings.data, pictures), extractor)
    for seed in trainings.seeds:
        for name, recipe in trainings.recipes.items():
            arm = _arm(trainings, name)
            if (arm, seed) in measured(out / RUNS):
                console.print(f"{name}, seed {seed}: there already")
                continue
            console.print(f"{name}, seed {seed}: training")
            model, cost = _trained(replace(recipe, fit=replace(recipe.fit, seed=seed)), pictures, out, name)
            # The cost first: a row of runs.csv marks the training as done.
            note(out / COSTS, {"name": name, "seed": seed} | cost)
            append_run(out / RUNS, _row(trainings, name, seed, model, reference, out.name))
    costs = sealed_csv.read(out / COSTS, ("name", "seed"))
    style.save(trainings_figure(costs, read_runs(out), list(trainings.recipes)), out / FIGURE)
    write_report(out, out, title="Backbones trained alike")
    return out


def _settings(trainings: Trainings, pictures: Pictures) -> dict[str, object]:
    choices = asdict(replace(trainings, recipes={}))
    recipes = {
        name: {"backbone": asdict(r.backbone), "fit": asdict(r.fit), "process": r.process.config()}
        for name, r in trainings.recipes.items()
    }
    return {"trainings": choices | {"recipes": recipes}, "data": pictures.fingerprint}


def _family(trainings: Trainings, name: str) -> str:
    return "full" if name == next(iter(trainings.recipes)) else name


def _arm(trainings: Trainings, name: str) -> str:
    family = _family(trainings, name)
    return arm_name(family, trainings.solver, trainings.steps, None, name if family == "full" else "")


def _trained(recipe: Train, pictures: Pictures, out: Path, name: str) -> tuple[DynamicDepth, dict[str, float]]:
    """Train, or go on, or load -> the model and the figures of its training."""
    place = f"{name.replace('/', '-')}-s{recipe.fit.seed}"
    model, result = recipe.run(pictures, out / "trainings" / place)
    checkpoints.save(model, out / "models" / place)
    return model, backbone_cost(model, recipe.fit, result) | {"loss": final_loss(model, pictures)}


@torch.no_grad()
def final_loss(model: DynamicDepth, pictures: Pictures, num: int = 512, batch_size: int = 64) -> float:
    """Return the mean training loss on the same `num` pictures, timesteps and noise for every model."""
    generator, process, total = torch.Generator().manual_seed(0), model.process, 0.0
    device, num = next(model.parameters()).device, min(num, len(pictures))
    for first in range(0, num, batch_size):
        items = [pictures[i] for i in range(first, min(first + batch_size, num))]
        x, y = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        t, eps = process.sample_timesteps(len(x), generator), torch.randn(x.shape, generator=generator)
        loss, _ = denoising_loss(model, process, *(part.to(device) for part in (x, t, eps, y)))
        total += loss.item() * len(x)
    return total / num


def _row(
    trainings: Trainings, name: str, seed: int, model: DynamicDepth, real: Measured, run_name: str
) -> dict[str, object]:
    """Draw the pictures of one training and score them -> a row of runs.csv."""
    plan = full_plan(model, trainings.solver, trainings.steps, trainings.cfg_scale)
    drawn = sample(
        model,
        model.backbone.condition.in_turn(trainings.num_images),
        plan=plan,
        solver=trainings.solver,
        num_steps=trainings.steps,
        cfg_scale=trainings.cfg_scale,
        seed=seed,
        batch_size=trainings.batch_size,
    )
    if not model.pixel_space:
        raise InputError(f"{name}: makes latents; expected a model of pixels")
    parameter = next(model.parameters())
    return dict.fromkeys(COLUMNS) | {
        "run": run_name,
        "machine": manifest.machine(parameter.device.type),
        "extractor": real.extractor.name,
        "metric": real.extractor.metric_name,
        "model": TRAINED_ALIKE,
        "arm": _arm(trainings, name),
        "family": _family(trainings, name),
        "solver": trainings.solver,
        "steps": trainings.steps,
        "cfg_scale": trainings.cfg_scale,
        "block": seed,
        "seed": seed,
        "num_images": trainings.num_images,
        "share_of_blocks": 1.0,
        "ms_per_picture": 1e3 * drawn.seconds / trainings.num_images,
        "noise": kind_of(trainings.solver),
        "labels": "balanced",
        "resize": "",
        "reference": "pictures",
        "role": "score",
        "plan": "",
        "variant": "",
        "settings": name,
        "macs": model_macs(model).plan(plan),
        "compiled": "eager",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": trainings.batch_size,
        "fd": score(drawn.pictures, real)["fd"],
    }
