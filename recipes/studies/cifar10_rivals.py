"""CIFAR-10 at 10 UniPC steps: would any peer that needs no training beat the plans of `cifar10_frontier`?

    dyndit compare cifar10_rivals --model runs/cifar10/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10-rivals     # resumable

`cifar10_frontier` has two peers at one setting each; this study has every peer at every setting. `--model` gives the
exits and the table of `cifar10_frontier`; without it the run makes them first. The study
leaves out peers that train (pruned blocks, a smaller model), random plans, and skipped layers, which were far behind on
the digits.

Measured on 3 of the 5 blocks (docs/results/cifar10-rivals): no. 34 of the 37 arms of peers and of no guidance are
clearly worse, by both extractors, than one plan that is no slower. The other three are the guidance intervals, which
take 36 ms and more; the cheapest plan takes 14. On 2 cores of an AMD EPYC with AVX-512 BF16, 2026-11-28: 13 minutes of
sampling for the 3 blocks.
"""

from dataclasses import replace

from dyndit.analysis.compare.peers import peers
from dyndit.recipes.cifar10_frontier import experiment as frontier

experiment = replace(
    frontier,
    points=(("unipc", 10),),
    full_points=tuple(("unipc", steps) for steps in (5, 6, 7, 8, 10)),
    unguided_points=tuple(("unipc", steps) for steps in (7, 10)),
    peers=tuple(
        settings
        for peer in peers().values()
        if peer.available()
        and peer.name not in ("pruned", "student", "switch", "width", "layer-skip", "random", "diffusers-full")
        for settings in peer.chosen()
    ),
    num_blocks=5,
    num_images=200,
)
