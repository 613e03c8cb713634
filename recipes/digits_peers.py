"""Digits: compare plans with every peer that a user might pick instead of dynamic depth, on the same weights.

    dyndit compare digits_peers --out runs/peers                     # resumable

Two extractors score every picture: one that plans are calibrated on, and one that no plan is chosen by.
The exits are the quickstart's exits. The run also trains the small model of the switch and the pruned backbones, in
`runs/peers/peers`, and reuses them when it resumes. A peer without its package is left out. The run's manifest names
the peers that took part.

Measured (docs/results/peers): from 3 to 5 ms a picture searched plans have the lowest Fréchet distance of all. Above 5
ms FasterCache is level with them, 1.32 against 1.33. It took 45 minutes on 2 cores of an AMD EPYC, 2026-11-23: 11 came
before the first arm (exits, table, searches, small model, pruned backbones).
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Controls
from dyndit.analysis.compare.peers import peers
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes import digits

experiment = replace(
    digits.quickstart,
    calibration=CalibrationSettings(num_pictures=256, num_bands=10, batch_size=64),
    full_solvers=("dpmpp", "ddpm"),
    full_steps=(4, 5, 6, 7, 8, 10, 12, 15, 20),
    dynamic_steps=(10,),
    budgets=(0.35, 0.45, 0.6, 0.75),
    unguided_steps=(5, 10),
    controls=Controls(solver="ddim", steps=10, depths=(6,), num_ramps=2, num_shuffled=2),
    peers=tuple(settings for peer in peers().values() if peer.available() for settings in peer.chosen()),
    peer_steps=(10,),
    metrics=("fd", "kid", "is", "prc"),
    more_extractors=("digits-lenet",),
    num_blocks=8,
    num_images=250,
    batch_size=50,
)
