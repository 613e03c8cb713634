"""Time plans against each other: paired, alternating, warmed up, in one process."""

from collections.abc import Mapping

import pandas as pd

from dyndit.analysis.latency import order_of
from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError
from dyndit.plan import DepthPlan
from dyndit.sampler import balanced_labels, sample


def time_plans(
    model: DynamicDepth, plans: Mapping[str, DepthPlan], *, batch_size: int, rounds: int, warmup: int = 1
) -> pd.DataFrame:
    """Draw one batch under every plan, round by round.

    -> columns round, arm, scope ("noise to uint8" or "denoiser", the network alone), seconds. Order changes from
    round to round. Each scope has a call of its own, as timing the parts makes a GPU wait between them.
    """
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: expected at least 1")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected at least 1")
    labels = balanced_labels(batch_size, model.backbone.num_classes)
    names, rows = list(plans), []
    for k in range(-warmup, rounds):
        for name in order_of(names, k):
            plan = plans[name]
            draw = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
            whole, parts = (
                sample(model, labels, plan=plan, batch_size=batch_size, stats=stats, **draw) for stats in (False, True)
            )
            if k >= 0:
                rows.append({"round": k, "arm": name, "scope": "noise to uint8", "seconds": whole.seconds})
                network = sum(parts.network_seconds)
                rows.append({"round": k, "arm": name, "scope": "denoiser", "seconds": network})
    return pd.DataFrame(rows)
