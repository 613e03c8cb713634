"""Time plans against each other: paired, alternating, warmed up, in one process."""

from collections.abc import Mapping

import pandas as pd
import torch

from dyndit.analysis.latency import order_of
from dyndit.dynamic import DynamicDepth
from dyndit.plan import DepthPlan
from dyndit.sampler import balanced_labels, sample


def time_plans(
    model: DynamicDepth, plans: Mapping[str, DepthPlan], *, batch_size: int, rounds: int, warmup: int = 1
) -> pd.DataFrame:
    """Draw one batch under every plan, round by round.

    -> columns round, arm, scope ("noise to uint8" or "denoiser", the network alone), seconds. Order changes from
    round to round; both scopes come from the same call.
    """
    labels = balanced_labels(batch_size, model.backbone.num_classes)
    names, rows = list(plans), []
    for k in range(-warmup, rounds):
        for name in order_of(names, k):
            plan = plans[name]
            with torch.inference_mode():
                result = sample(
                    model,
                    labels,
                    plan=plan,
                    solver=plan.solver,
                    num_steps=plan.num_steps,
                    cfg_scale=plan.cfg_scale,
                    batch_size=batch_size,
                    stats=True,
                )
            if k >= 0:
                rows.append({"round": k, "arm": name, "scope": "noise to uint8", "seconds": result.seconds})
                network = sum(result.network_seconds)
                rows.append({"round": k, "arm": name, "scope": "denoiser", "seconds": network})
    return pd.DataFrame(rows)
