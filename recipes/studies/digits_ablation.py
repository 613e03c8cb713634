"""Digits: with every lever on, what is each lever of the calibration worth?

    dyndit compare digits_ablation --out runs/ablation                # resumable

The comparison's own arms (`searched`) have every lever: LoRA on the backbone, wide heads, states of the sampler, errors
weighted by path KL, own guides, forecasts with a learned correction, two measured plans per budget, a band for each
step. A variant lacks the lever in its name. `digits_ablation_training` turns off the levers of the training.

Measured (docs/results/ablation), Fréchet distance against all on, budgets 0.3 / 0.45, by the extractor that plans are
calibrated on: no own guides +0.06 / +0.14, no forecasts +0.14 / +0.15, not refined +0.04 / -0.01, 5 bands +0.10 /
+0.23; all on has 1.21 / 1.02, full depth 1.53. On 2 cores of an AMD EPYC, 2026-11-24: 3 minutes of sampling; the
backbone, exits and tables before it were not timed.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.digits import distill as plain
from dyndit.recipes.digits import study

table = CalibrationSettings(
    num_pictures=96, num_bands=10, batch_size=48, num_depths=5, own_guides=True, forecast_ages=2
)
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
    calibration=table,
    refinements=2,
    full_steps=(4, 5, 7, 10, 20),
    variants=(
        Variant("no-own-guides", calibration=replace(table, own_guides=False)),
        Variant("no-forecasts", calibration=replace(table, forecast_ages=0)),
        Variant("not-refined", refinements=0),
        Variant("5-bands", calibration=replace(table, num_bands=5, forecast_ages=0)),
    ),
    peers=(),
)
