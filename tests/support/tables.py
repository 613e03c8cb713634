"""Random shift tables."""

from dataclasses import replace

import torch

from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step
from dyndit.plans.table import ShiftTable
from dyndit.stats import moments

PARTS = PartTimes(embed=0.1, block=1.0, exit=0.1, head=0.1)


def table_from(
    features: dict, base: torch.Tensor, reference: torch.Tensor, edges: tuple, choices: tuple[Step, ...]
) -> ShiftTable:
    """A table from features per (band, choice), as `measure_shifts` makes it."""
    n = len(base)

    def shifts(change) -> torch.Tensor:
        bands = range(len(edges) - 1)
        return torch.stack([torch.stack([change(features[band, choice]) for choice in choices]) for band in bands])

    return ShiftTable(
        edges=edges,
        choices=choices,
        mean=shifts(lambda f: (f - base).mean(0)),
        second=shifts(lambda f: (f.T @ f - base.T @ base) / n),
        base=moments(base),
        reference=moments(reference),
        cost=COST,
        num_blocks=NUM_BLOCKS,
        solver="ddim",
        num_steps=len(edges) - 1,
        cfg_scale=1.5,
        seed=0,
        num_pictures=n,
        extractor="toy",
        extractor_fingerprint="toy",
    )


NUM_BLOCKS = 4


COST = CostModel(8, NUM_BLOCKS, one=PARTS, two=replace(PARTS, block=1.9), solver=0.05)


def random_table(num_steps: int, num_depths: int, seed: int, num_features: int = 3) -> ShiftTable:
    """A table whose shallow exits shift the pictures more, as real ones do, in directions of their own."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(64, num_features, generator=g, dtype=torch.float64)
    reference = torch.randn(64, num_features, generator=g, dtype=torch.float64)
    depths = range(1, num_depths + 1)
    choices = tuple(Step.equal(d, guided=True) for d in depths if d != NUM_BLOCKS)
    features = {
        (band, choice): base
        + (NUM_BLOCKS - choice.depth) / NUM_BLOCKS * torch.randn(base.shape, generator=g, dtype=torch.float64)
        + 0.5 * torch.randn(num_features, generator=g, dtype=torch.float64) * (NUM_BLOCKS - choice.depth) / NUM_BLOCKS
        for band in range(num_steps)
        for choice in choices
    }
    edges = tuple(float(t) for t in range(100 * num_steps, -1, -100))
    return table_from(features, base, reference, edges, choices)


def full_plan(table: ShiftTable) -> DepthPlan:
    return DepthPlan.full(tuple(int(t) for t in table.edges[:-1]), NUM_BLOCKS, "ddim", table.cfg_scale)
