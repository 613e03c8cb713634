"""Ablations on digits: how exits and plans are made, one choice changed at a time, at two tight budgets.

    dyndit compare digits_levers --out runs/levers                   # resumable

The comparison's own arms (`searched`) are calibrated as those of `digits_peers`; each variant differs from them in what
its name says. The learned and the confidence router are arms of their own. docs/experiments.md tells what came of
`digits_reuse`; the other variants and the two routers are not measured yet.
"""

from dataclasses import replace

from dyndit.calibration import CalibrationSettings
from dyndit.experiment import Variant
from dyndit.recipes.digits_peers import experiment as peers
from dyndit.routers.confidence import ConfidenceSettings
from dyndit.routers.learned import LearnedSettings

base = peers.calibration
experiment = replace(
    peers,
    full_solvers=(),
    full_steps=(4, 5, 6, 7, 8, 10, 15, 20),
    unguided_steps=(5, 10),
    controls=None,
    budgets=(0.35, 0.5),
    variants=(
        Variant("reuse", calibration=replace(base, reuse=True)),
        Variant("5-bands", calibration=replace(base, num_bands=5)),
        Variant("96-seeds", calibration=CalibrationSettings(num_pictures=96, num_bands=10, batch_size=96)),
        Variant("4-depths", calibration=replace(base, num_depths=4)),
        Variant("block-head", distill=replace(peers.distill, exits=replace(peers.distill.exits, head="block"))),
        Variant("short-distillation", distill=replace(peers.distill, fit=replace(peers.distill.fit, steps=100))),
        Variant("long-distillation", distill=replace(peers.distill, fit=replace(peers.distill.fit, steps=2_000))),
    ),
    learned=LearnedSettings(),
    confidence=ConfidenceSettings(),
    peers=tuple(peer for peer in peers.peers if peer.name in ("faster-cache", "interval")),
    metrics=("fd", "kid"),
    num_blocks=5,
    num_images=400,
)
