"""Ablations on CIFAR-10: wide heads off, and refinement carried further, at UniPC-10 and two tight budgets.

    dyndit compare cifar10_ablation --model runs/cifar10/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10-ablation     # resumable

With `--model` the exits and the table of `cifar10_frontier` are taken as the comparison's own; without it they are
made. "plain-heads" distils plain exits on the same trunk, with all else as there, and measures a table of its own;
"refined-8" measures up to eight more plans for each budget where the comparison's own measures up to two. The pairs are
those that wide exits are good for: plain ones would rather stand after 9 to 11 layers.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.cifar10_frontier import distill
from dyndit.recipes.studies.cifar10_levers import experiment as levers

experiment = replace(
    levers,
    variants=(
        Variant("plain-heads", distill=replace(distill, exits=replace(distill.exits, head="adaln-linear"))),
        Variant("refined-8", refinements=8),
    ),
)
