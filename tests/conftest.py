"""Tiny models for every test. Their weights are random all through, so that depth, labels and exits matter."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of child processes too: two at a time, on two cores

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from dyndit.models.base import Backbone
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.search import SearchSettings
from support.models import TINY, MakeBackbone, MakeModel, randomise

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what is in the background so
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("dyndit", deadline=None, max_examples=50)
settings.load_profile("dyndit")


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection of garbage: every test would pay for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_backbone() -> MakeBackbone:
    """Build a tiny backbone: make_backbone(seed=0, **changes of the config)."""

    def make(seed: int = 0, **changes: object) -> ClassConditionalDiT:
        backbone = ClassConditionalDiT(replace(TINY, **changes))
        randomise(backbone, seed)
        return backbone.eval()

    return make


@pytest.fixture(scope="session")
def make_model(make_backbone: MakeBackbone) -> MakeModel:
    """Build a tiny backbone with random exits: make_model(layers=(), head="adaln-linear", seed=0, **changes)."""

    def make(layers: tuple[int, ...] = (), head: str = "adaln-linear", seed: int = 0, **changes: object):
        backbone = make_backbone(seed, **changes)
        exits = Exits(backbone, ExitConfig(layers, head))
        randomise(exits, seed + 1)
        return DynamicDepth(backbone, exits).eval()

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Build x: (B, C, H, W), t: (B,), y: (B,) that a backbone takes."""

    def make(backbone: Backbone, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *backbone.sample_shape)
        t = torch.randint(1000, (batch,), generator=generator)
        y = torch.randint(backbone.condition.num_classes, (batch,), generator=generator)
        return torch.randn(shape, generator=generator), t, y

    return make


@pytest.fixture
def model(make_model: MakeModel) -> DynamicDepth:
    """A tiny model of 6 blocks with random exits after every one."""
    return make_model()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checkpoints and data beside the repository."""
    return Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def cifar10_dit(shared: Path) -> Path:
    """A DiT trained with the published code on CIFAR-10."""
    path = shared / "checkpoints" / "cifar10-dit.pt"
    if not path.exists():
        pytest.skip("no ../shared/checkpoints/cifar10-dit.pt beside the checkout")
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep features of test pictures out of the user's cache, and progress out of what commands print."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DYNDIT_PROGRESS", "off")  # what a slow machine would say in between
        yield


@pytest.fixture
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches end early, where a test is not about what they find."""
    quick = partial(SearchSettings, num_starts=1, num_kicks=0, evaluations=8)
    for module in ("dyndit.plans.search", "dyndit.plans.descent", "dyndit.analysis.compare.context"):
        monkeypatch.setattr(f"{module}.SearchSettings", quick)
