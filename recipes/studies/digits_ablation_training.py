"""Digits: with every lever on, what is each lever of the exits' training worth, and what are all levers together?

    dyndit compare digits_ablation_training --out runs/ablation-training   # resumable

The comparison's own arms (`searched`) have every lever, as in `digits_ablation`. Every variant distils exits anew, on
the given backbone. "plain" is the recipe of `digits_levers`, with every lever off. FasterCache and guidance intervals
are measured too.

Measured (docs/results/ablation-training), Fréchet distance against all on, budgets 0.3 / 0.45, by the extractor that
plans are calibrated on: frozen backbone -0.10 / +0.01, plain heads -0.10 / +0.21, noised states +0.06 / -0.04, even
weights -0.06 / +0.07, plain forecasts -0.01 / +0.12, plain +0.02 / +0.07; all on has 1.38 / 1.04, full depth 1.53. So
together the levers bring little on digits. 41 minutes on 2 cores of an AMD EPYC, 2026-11-28.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.digits import distill as plain
from dyndit.recipes.digits import study

distill = replace(
    plain,
    exits=replace(plain.exits, head="wide"),
    backbone="lora",
    backbone_rate=1.0,
    states="sampler",
    weighting="path-kl",
    forecasts=True,
)
experiment = replace(
    study,
    distill=distill,
    calibration=CalibrationSettings(
        num_pictures=96, num_bands=10, batch_size=48, num_depths=5, own_guides=True, forecast_ages=2
    ),
    refinements=2,
    full_steps=(4, 5, 7, 10, 20),
    variants=(
        Variant("plain", distill=plain, calibration=study.calibration, refinements=0),
        Variant("frozen-backbone", distill=replace(distill, backbone="frozen")),
        Variant("plain-heads", distill=replace(distill, exits=plain.exits)),
        Variant("noised-states", distill=replace(distill, states="noised")),
        Variant("even-weights", distill=replace(distill, weighting="even")),
        Variant("plain-forecasts", distill=replace(distill, forecasts=False)),
    ),
)
