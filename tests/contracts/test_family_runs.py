"""What every native family can do from training to pictures, asked through the package's own verbs in Python.

Each tiny config of tests/support trains, resumes, is saved and loaded, gets exits and runs a plan, under every process.
"""

import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dyndit.models.conditions import ConditionType
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.step import steps
from dyndit.process import processes
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.storage import load as checkpoints
from dyndit.training.conditioned import conditioned
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures
from dyndit.training.distill import Distill
from dyndit.training.fit import FitResult, fit
from dyndit.training.train import _Denoising
from support.models import TINY_CONFIGS, randomise, tiny

of_every_family = pytest.mark.parametrize(("name", "process"), list(product(TINY_CONFIGS, processes())))
FIT = FitConfig(steps=4, batch_size=4, learning_rate=1e-2, ema_decay=0.5, checkpoint_every=2, log_every=1, flip=False)


class Noise(Pictures):
    """Random pictures of a backbone's shape. Each value of its condition is a class, and classes come in turn."""

    can_flip, fingerprint = False, "noise"

    def __init__(self, shape: tuple[int, ...], condition: ConditionType, num: int = 16) -> None:
        self.channels, self.image_size = shape[0], tuple(shape[1:])
        self.x = torch.rand(num, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.class_names = tuple(dict.fromkeys(map(str, condition.in_turn(num))))
        self.num_classes = len(self.class_names)
        self.labels = [i % self.num_classes for i in range(num)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.labels[index]

    def uint8(self, indices=None) -> Tensor:
        return ((self.x if indices is None else self.x[list(indices)]) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def without_exits(name: str, process: str) -> DynamicDepth:
    return DynamicDepth(tiny(name, process), process=processes()[process]()).eval()


def with_exits(name: str, process: str) -> DynamicDepth:
    backbone = tiny(name, process)
    exits = Exits(backbone, ExitConfig(head="adaln-linear"))
    randomise(exits, seed=1)
    return DynamicDepth(backbone, exits, process=processes()[process]()).eval()


def data_of(model: DynamicDepth) -> Noise:
    return Noise(model.backbone.sample_shape, model.backbone.condition)


@of_every_family
def test_plans_run_and_pictures_know_no_batch_mates(name: str, process: str) -> None:
    model = with_exits(name, process)
    condition, solver = model.backbone.condition, model.process.usual_solver
    scale = 1.5 if condition.guided else 1.0
    options = {"solver": solver, "num_steps": 4, "cfg_scale": scale, "seed": 3, "batch_size": 4, "strict": True}
    full = full_plan(model, solver, 4, scale)
    values = condition.in_turn(3)
    whole = sample(model, values, **options)
    assert torch.equal(sample(model, values, plan=full, **options).pictures, whole.pictures)
    last = str(model.num_blocks - 1)
    kinds = ("3|1", "2|e1", "4|4", last) if condition.guided else ("3", "2", "4", last)
    plan = full.with_steps(steps(*kinds))
    together = sample(model, values, plan=plan, **options).pictures
    alone = [sample(model, [v], plan=plan, first_index=i, **options).pictures for i, v in enumerate(values)]
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(together, whole.pictures)


@of_every_family
def test_saved_and_loaded_it_is_the_same_model(name: str, process: str, tmp_path: Path) -> None:
    model = with_exits(name, process)
    checkpoints.save(model, tmp_path / "model")
    found = checkpoints.load(tmp_path / "model")
    assert found.identity == model.identity
    call = model.backbone.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for depth in model.depths:
            assert torch.equal(found(call.x, call.t, call.y, depth), model(call.x, call.t, call.y, depth))


@of_every_family
def test_training_resumes_bit_for_bit(name: str, process: str, tmp_path: Path) -> None:
    def run(out: Path) -> FitResult:
        task = _Denoising(without_exits(name, process), 1.0, None)
        data = conditioned(data_of(task.model), task.model.backbone.condition)
        return fit(task, data, FIT, out, progress=False)

    before, whole = tiny(name, process).state_dict(), run(tmp_path / "whole").weights
    assert any(not torch.equal(before[key], value) for key, value in whole.items())
    kept = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    (tmp_path / "broken" / "checkpoints").mkdir(parents=True)
    shutil.copytree(kept[0], tmp_path / "broken" / "checkpoints" / kept[0].name)
    result = run(tmp_path / "broken")
    again = result.weights
    assert list(result.losses["step"]) == [1, 2, 3, 4]  # the log belongs to the checkpoint
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@of_every_family
def test_exits_distil(name: str, process: str, tmp_path: Path) -> None:
    model = without_exits(name, process)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    settings = FitConfig(steps=12, batch_size=16, learning_rate=5e-3, ema_decay=0.5, flip=False)
    found, result = Distill(fit=settings).run(model, data_of(model), tmp_path)
    assert found.depths == tuple(range(1, model.num_blocks + 1))
    assert all(torch.equal(before[key], value) for key, value in found.backbone.state_dict().items())
    assert result.losses["loss"].iloc[-3:].mean() < result.losses["loss"].iloc[:3].mean()
