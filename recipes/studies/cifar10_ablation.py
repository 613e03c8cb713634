"""CIFAR-10: what are wide heads worth, and does more refinement find better plans? UniPC-10, two tight budgets.

    dyndit compare cifar10_ablation --model runs/cifar10/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10-ablation     # resumable

`--model` gives the exits and the table of `cifar10_frontier`; without it the run makes them first. "plain-heads"
distils plain exits on the same backbone and measures its own table, on the steps that were chosen for wide exits.
"refined-8" corrects predictions by up to eight measured plans for each budget. The comparison's own arms (`searched`)
use up to two.

Measured (docs/results/cifar10-ablation), Fréchet distance against `searched`, budgets 0.3 / 0.45: plain heads +23.96 /
+1.07 by resnet20 and +46.39 / +1.82 by vgg; eight refinements -0.25 / -0.24 and +0.56 / -0.38. On 2 cores of an AMD
EPYC with AVX-512 BF16, 2026-11-28: plain exits 5 minutes, their table 15, sampling 7.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.recipes.cifar10_frontier import distill
from dyndit.recipes.cifar10_frontier import experiment as frontier

experiment = replace(
    frontier,
    variants=(
        Variant("plain-heads", distill=replace(distill, exits=replace(distill.exits, head="adaln-linear"))),
        Variant("refined-8", refinements=8),
    ),
    points=(("unipc", 10),),
    budgets=(0.3, 0.45),
    full_points=(("unipc", 5), ("unipc", 10)),
    unguided_points=(("unipc", 10),),
    peers=(),
    num_blocks=5,
    num_images=400,
)
