"""Digits: what do own guides, a trained backbone, wide heads and a confidence router bring, one at a time?

    dyndit compare digits_levers --out runs/levers                   # resumable

The comparison's own arms (`searched`) use the plain recipe: the exits of the quickstart on a frozen backbone, and a
table of 128 seeds with a band for each of 10 steps. A variant differs in the choice in its name. The confidence
router is a separate arm.

Measured (docs/results/levers), Fréchet distance at budgets 0.3 / 0.45 by the extractor that plans are calibrated on:
plain 1.39 / 1.11, own guides 2.22 / 1.43, backbone trained whole 1.35 / 1.21, wide heads 1.52 / 1.20; full depth 1.52.
The confidence router has 1.67 in 4.2 ms; plain takes 3.0 / 4.7. No lever became a default on digits. 34 minutes on 2
cores of an AMD EPYC, 2026-11-24, including a learned router that the code no longer has.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.analysis.compare.peers.confidence import ConfidenceSettings
from dyndit.recipes.digits import distill, study

experiment = replace(
    study,
    variants=(
        Variant("own-guides", calibration=replace(study.calibration, own_guides=True)),
        Variant("whole", distill=replace(distill, backbone="whole")),
        Variant("wide-head", distill=replace(distill, exits=replace(distill.exits, head="wide"))),
    ),
    confidence=ConfidenceSettings(),
)
