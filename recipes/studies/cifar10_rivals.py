"""CIFAR-10 at 10 steps of UniPC: the plans of `cifar10_frontier` against every peer that needs no training.

    dyndit compare cifar10_rivals --model runs/cifar10/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10-rivals     # resumable

`cifar10_frontier` holds plans against the two peers that led on the digits, at one setting each; this asks whether
others would have led here. With `--model` its exits and table are taken; without it they are made. Left out are peers
that train (pruned blocks, a smaller model), skipped layers, which were far behind on the digits, and random plans.
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
        if peer.available() and peer.name not in ("pruned", "switch", "layer-skip", "random", "diffusers-full")
        for settings in peer.chosen()
    ),
    num_blocks=5,
    num_images=200,
)
