"""Ablations on digits: guides, the trunk, wide heads, other routers; one choice changed at a time, two tight budgets.

    dyndit compare digits_levers --out runs/levers                   # resumable

The comparison's own arms (`searched`) have the exits of the quickstart and a table of 128 seeds by 10 bands; each
variant differs from them in what its name says. The confidence router is an arm of its own. More of
the kind: `digits_distillation`, `digits_calibration`, `digits_tables`, `digits_reuse`; all on and one off:
`digits_ablation`. docs/experiments.md tells what came of each.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.analysis.compare.peers.confidence import ConfidenceSettings
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.digits_peers import experiment as peers

base = CalibrationSettings(num_pictures=128, num_bands=10, batch_size=64)
distill = peers.distill
experiment = replace(
    peers,
    calibration=base,
    calibration_solver="unipc",
    full_solvers=(),
    solvers=("unipc",),
    full_steps=(4, 5, 6, 7, 8, 10, 15, 20),
    unguided_steps=(5, 10),
    controls=None,
    budgets=(0.3, 0.45),
    variants=(
        Variant("own-guides", calibration=replace(base, own_guides=True)),
        Variant("whole", distill=replace(distill, trunk="whole")),
        Variant("wide-head", distill=replace(distill, exits=replace(distill.exits, head="wide"))),
    ),
    confidence=ConfidenceSettings(),
    peers=tuple(peer for peer in peers.peers if peer.name in ("faster-cache", "interval")),
    metrics=("fd", "kid"),
    num_blocks=5,
    num_images=400,
)
