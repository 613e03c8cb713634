"""Times that a test of plans may count on."""

from dataclasses import replace

import pytest

from dyndit.plans.cost import CostModel
from dyndit.plugin.calibrate import PipelineSampler
from support.tables import COST


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are timed as ever, but plans count with `COST`: on a busy machine a shallow step may seem as slow."""
    measure = PipelineSampler.cost

    def cost(sampler: PipelineSampler, batch_size: int) -> CostModel:
        measured = measure(sampler, batch_size)
        return replace(COST, batch_size=measured.batch_size, num_blocks=measured.num_blocks, device=measured.device)

    monkeypatch.setattr(PipelineSampler, "cost", cost)
