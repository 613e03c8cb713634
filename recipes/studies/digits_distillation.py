"""Ablations on digits: what exits are, and what they are distilled on, at two tight budgets.

    dyndit compare digits_distillation --model runs/levers/model --out runs/distillation   # resumable

With `--model` the exits and the table of `digits_levers` are taken as the comparison's own; without it they are made.
Every variant distils exits anew, on the same trunk; "deep-supervision" trains one from scratch, by the recipe that the
trunk of the digits was trained by, with exits from the first step.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.digits import train
from dyndit.recipes.studies.digits_levers import distill
from dyndit.recipes.studies.digits_levers import experiment as levers

experiment = replace(
    levers,
    variants=(
        Variant("lora", distill=replace(distill, trunk="lora", trunk_rate=1.0)),
        Variant("sampler-states", distill=replace(distill, states="sampler")),
        Variant("path-kl", distill=replace(distill, weighting="path-kl")),
        Variant("short-distillation", distill=replace(distill, fit=replace(distill.fit, steps=100))),
        Variant("deep-supervision", train=replace(train, exits=distill.exits)),
        Variant("long-distillation", distill=replace(distill, fit=replace(distill.fit, steps=2_000))),
    ),
    confidence=None,
)
