"""Does a plan gain by reusing the guidance of earlier steps? Digits, 10 steps, four budgets, two judges.

    dyndit compare digits_reuse --out runs/reuse                     # resumable

Measured: 5 minutes of table for the variant and 8 of sampling on 2 cores of an AMD EPYC, 2026-11-23, besides exits and
the table of the comparison's own plans. docs/experiments.md tells what came out.
"""

from dataclasses import replace

from dyndit.recipes.digits_levers import experiment as levers

experiment = replace(
    levers,
    variants=tuple(variant for variant in levers.variants if variant.name == "reuse"),
    learned=None,
    confidence=None,
    budgets=(0.3, 0.4, 0.5, 0.65),
    full_steps=(5, 7, 10, 15, 20),
)
