"""Plans for the studies that take plans of other exits."""

from dataclasses import replace
from pathlib import Path

import pytest

from dyndit.analysis.compare.experiment import Inputs
from dyndit.plans.step import steps
from dyndit.sampling.loop import full_plan
from dyndit.storage import load as checkpoints


@pytest.fixture
def plans(inputs: Inputs, tmp_path: Path) -> tuple[Path, Path]:
    """Two plans that were made for exits of others."""
    model = checkpoints.load(inputs.model)
    assert model.exits is None
    whole = full_plan(model, "unipc", 4, 1.5)
    texts = ("12|12", "2+|held*1.4", "8|e4*2", "12|12")
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, order in zip(files, (texts, texts[::-1]), strict=True):
        replace(whole.with_steps(steps(*order)), exits="of others").save(file)
    return files
