"""Draw a few arms in turn and score them block by block: what studies without timing or tuning need."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dyndit import sealed_csv
from dyndit.analysis.compare.run import in_turn
from dyndit.analysis.metrics.features import Measured
from dyndit.progress import progress_bar
from dyndit.stats import frechet_distance, moments

Draw = Callable[[int, int], Tensor]
"""(block, batch) -> pictures, uint8 (B, C, H, W)."""
BLOCK = "block"


def drawn_in_blocks(
    path: Path,
    names: tuple[str, ...],
    arms: Mapping[tuple[str, ...], Draw],
    real: list[Measured],
    size: tuple[int, int],
) -> pd.DataFrame:
    """Draw every arm -> a row per arm and block: `names`, "block", and a Fréchet distance by each extractor.

    path: of the rows; blocks in it are not drawn again. size: number of blocks, and of batches in each. The arms take
    turns batch by batch, and a block is scored when all its arms are drawn.
    """
    key, (num_blocks, num_batches) = (*names, BLOCK), size
    rows = sealed_csv.read(path, key) if path.exists() else pd.DataFrame({name: [] for name in key})
    with progress_bar("sampling and scoring", unit="batches") as advance:
        for block in range(num_blocks):
            if block in set(rows[BLOCK]):
                continue
            drawn: dict[tuple[str, ...], list[Tensor]] = {arm: [] for arm in arms}
            for batch in range(num_batches):
                advance(block * num_batches + batch, num_blocks * num_batches)
                for arm in in_turn(arms, block, batch):
                    drawn[arm].append(arms[arm](block, batch))
            scored = []
            for arm, parts in drawn.items():
                row: dict[str, Any] = {**dict(zip(names, arm, strict=True)), BLOCK: block}
                for one in real:
                    features = one.extractor.features(torch.cat(parts))
                    row[one.extractor.name] = frechet_distance(moments(features), one.moments())
                scored.append(row)
            known = [rows] * (not rows.empty)
            sealed_csv.write(path, pd.concat([*known, pd.DataFrame(scored)]))
            rows = sealed_csv.read(path, key)
    return rows
