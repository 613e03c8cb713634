"""The tiny verbs that these tests kill."""

import os
from collections.abc import Iterator

import accelerate
import pytest
from matplotlib.figure import Figure

from dyndit import files, manifest
from dyndit.calibration import samplers
from dyndit.cli import recipes
from support.tiny_verbs import TinyVerbs, fixed_cost


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyVerbs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "measure_cost", fixed_cost)
        patch.setattr(manifest, "_revision", str)  # asking git takes longer than a run, and so do versions
        patch.setattr(manifest, "_version", str)
        patch.setattr(Figure, "savefig", lambda _self, to, **_: getattr(to, "write_bytes", bytes)(b"drawn"))
        patch.setattr(os, "fsync", lambda _handle: None)  # no power is cut here
        patch.setattr(accelerate.Accelerator, "init_trackers", lambda *_: None)
        patch.setattr(files, "_is_alive", lambda _pid: False)  # a crash within this process leaves drafts in its name
        find = recipes.find
        verbs = TinyVerbs(tmp_path_factory.mktemp("inputs"))
        packaged = {"digits": str(verbs.recipe)}
        patch.setattr(recipes, "find", lambda name, *options: find(packaged.get(name, name), *options))
        yield verbs
