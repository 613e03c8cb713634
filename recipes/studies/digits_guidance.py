"""Digits: quality over the guidance scale, by the unconditional pass, by an own exit, and in an interval.

    dyndit compare digits_guidance --out runs/guidance               # resumable

Guidance by an own exit is Internal Guidance (arXiv:2512.24176) with exits distilled afterwards; it costs a head and no
second pass. The interval leaves out the noisiest and the last steps (arXiv:2404.07724). The report's figure
`guidance.png` has a line per way; a section per scale compares the ways at that scale.

Measured: docs/family.md has the figure and the best scale of each way; the run takes 7 minutes on 2 cores.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import GuidanceSweep
from dyndit.recipes.digits import quickstart

experiment = replace(
    quickstart,
    guidance=GuidanceSweep(steps=10, exits=(3, 6, 9), intervals=((0.5, 10.0),)),
    solvers=("ddim",),
    full_steps=(5, 10),
    budgets=(0.5,),
    metrics=("fd", "is", "prc"),
    more_extractors=("digits-lenet",),
    num_blocks=5,
    num_images=400,
    batch_size=50,
)
