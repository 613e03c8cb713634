"""Measure each exit's error against the full model, by band of log-SNR."""

from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from torch.utils.data import default_collate

from dyndit.models.dynamic import DynamicDepth
from dyndit.progress import tracked
from dyndit.training.conditioned import as_condition, conditioned
from dyndit.training.data import Pictures
from dyndit.training.losses import exit_errors

FILE = "exit-errors.csv"


@torch.no_grad()
def exit_error_table(
    model: DynamicDepth, data: Pictures, *, num_pictures: int = 512, num_bands: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Measure each exit's error against the full model, by band of log-SNR, on the device that `Distill` trains on.

    Bands are equal in timesteps. Columns: depth, band, log_snr_low, log_snr_high, noise_error (mean square on
    the noise channels), variance_error. A diagnostic: README says why plans are not chosen on it.
    """
    process, generator = model.process, torch.Generator().manual_seed(seed)
    device: Any = PartialState().device
    usual = data.groups[0] if data.groups else range(len(data))  # clips of one shape
    pick = [usual[k] for k in torch.randperm(len(usual), generator=generator)[:num_pictures].tolist()]
    items = conditioned(data, model.backbone.condition)
    x_0, y = default_collate([items[i] for i in pick])
    y = as_condition(y)
    edges = torch.linspace(0, process.num_timesteps, num_bands + 1).long()
    rows = []
    home = next(model.parameters()).device
    model.to(device)
    bands = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    for band, (low, high) in enumerate(tracked(bands, "measuring exit errors", unit="bands")):
        t = torch.randint(low, high, (len(x_0),), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        errors = exit_errors(model, process.noised(x_0, eps, t).to(device), t.to(device), y.to(device))
        snr = process.log_snr(torch.tensor([high - 1, low])).tolist()
        rows += [
            {
                "depth": depth,
                "band": band,
                "log_snr_low": snr[0],
                "log_snr_high": snr[1],
                "noise_error": error[:, 0].mean().item(),
                "variance_error": error[:, 1].mean().item(),
            }
            for depth, error in errors.items()
        ]
    model.to(home)
    return pd.DataFrame(rows)
