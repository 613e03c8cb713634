"""Digits: what does each choice in the exits' distillation bring alone?

    dyndit compare digits_distillation --model runs/levers/model --out runs/distillation   # resumable

`--model` gives the exits and the table of `digits_levers`; without it the run makes them first. The comparison's own
arms (`searched`) use the plain recipe. Every variant distils exits anew, on the same backbone; "deep-supervision"
trains a backbone from scratch by the recipe `digits`, with exits from the first step.

Measured (docs/results/distillation), Fréchet distance against `searched`, budgets 0.3 / 0.45, by the extractor that
plans are calibrated on: LoRA +0.05 / +0.17, sampler states +0.05 / +0.02, path KL +0.10 / +0.02, 100 steps +0.13 /
+0.07, 2,000 steps -0.07 / +0.20, deep supervision +0.98 / +1.07. So nothing surely beats the plain recipe. 48 minutes
on 2 cores of an AMD EPYC, 2026-11-28, including four variants that the code no longer has.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.digits import distill, study, train

experiment = replace(
    study,
    variants=(
        Variant("lora", distill=replace(distill, backbone="lora", backbone_rate=1.0)),
        Variant("sampler-states", distill=replace(distill, states="sampler")),
        Variant("path-kl", distill=replace(distill, weighting="path-kl")),
        Variant("short-distillation", distill=replace(distill, fit=replace(distill.fit, steps=100))),
        Variant("deep-supervision", train=replace(train, exits=distill.exits)),
        Variant("long-distillation", distill=replace(distill, fit=replace(distill.fit, steps=2_000))),
    ),
)
