"""Rows of runs.csv."""

import numpy as np
import pandas as pd

from dyndit.analysis.report.runs import COLUMNS

FULL = {4: (4.0, 16.0), 8: (8.0, 12.0), 16: (16.0, 8.0)}


def run_row(**changes) -> dict[str, object]:
    row = dict.fromkeys(COLUMNS) | {
        "run": "r", "machine": "cpu", "extractor": "digits", "metric": "FD-digits", "model": "m",
        "arm": "full-10", "family": "full", "solver": "ddim", "steps": 10, "cfg_scale": 1.5, "block": 0,
        "seed": 0, "num_images": 100, "share_of_blocks": 1.0, "mean_depth_cond": 12.0,
        "mean_depth_uncond": 12.0, "ms_per_picture": 10.0, "ms_denoiser": 9.0, "fd": 8.0, "role": "score",
        "plan": "", "variant": "", "settings": "",
    }  # fmt: skip
    return row | changes


def frame(ms: float, fd: float, steps: int = 8, noise: float = 0.0, num_blocks: int = 5, **changes) -> pd.DataFrame:
    """Full depth, and one searched arm; all arms share a strong effect of the block's seed."""
    rng = np.random.default_rng(0)
    rows = []
    for block in range(num_blocks):
        shift = 3.0 * block
        for k, (time, value) in FULL.items():
            changed = {"arm": f"full-{k}", "steps": k, "ms_per_picture": time, "fd": value + shift}
            rows.append(run_row(block=block, **changed))
        arm = {"arm": "searched", "family": "searched", "steps": steps, "budget": 0.6, "share_of_blocks": 0.5}
        value = fd + shift + noise * rng.normal()
        rows.append(run_row(block=block, ms_per_picture=ms, fd=value, **{**arm, **changes}))
    return pd.DataFrame(rows)
