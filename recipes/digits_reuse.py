"""Does a plan gain by reusing the guidance of earlier steps? Digits, 10 steps, four budgets, two judges.

    dyndit compare digits_reuse --out runs/reuse                     # resumable

Measured: 5 minutes of table for the variant and 8 of sampling on 2 cores of an AMD EPYC, 2026-11-23, besides exits and
the table of the comparison's own plans. docs/experiments.md tells what came out.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.digits_peers import experiment as peers

experiment = replace(
    peers,
    full_solvers=(),
    full_steps=(5, 7, 10, 15, 20),
    unguided_steps=(5, 10),
    controls=None,
    budgets=(0.3, 0.4, 0.5, 0.65),
    variants=(Variant("reuse", calibration=replace(peers.calibration, held=True)),),
    peers=tuple(peer for peer in peers.peers if peer.name in ("faster-cache", "interval")),
    metrics=("fd", "kid"),
    num_blocks=5,
    num_images=400,
)
