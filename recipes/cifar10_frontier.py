"""CIFAR-10 on a CPU: plans at few steps of good solvers, against fewer steps and the strongest peers, by two judges.

    dyndit distill cifar10 --model TRUNK --data DIR --out runs/cifar10-exits
    dyndit compare cifar10_frontier --model runs/cifar10-exits --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10     # resumable

TRUNK is what `dyndit train cifar10` left, or any checkpoint of 32 x 32 pixels and 10 classes; DIR holds a subfolder of
pictures per class. Plans are searched on a table of 10 DDIM steps, whose bands serve 20 steps and UniPC; the second
judge, `vgg-cifar10`, sees the same pictures, and no plan was chosen by it. Products run in bf16, for every arm alike:
choose `precision="fp32"` on a machine without it.

Peers: of those that led on the digits (FasterCache) and of what guidance alone is worth (an interval, and none).
"""

from dataclasses import replace

from dyndit.analysis.peers.faster_cache import FasterCache
from dyndit.analysis.peers.interval import GuidanceInterval
from dyndit.calibration import CalibrationSettings
from dyndit.plan import own_exit
from dyndit.recipes.cifar10_peers import experiment as peers

# Below half of the time a second pass is out of reach: most pairs are one branch, alone or guided by its own exit.
PAIRS = (
    *((12, uncond) for uncond in (6, 0, own_exit(10), own_exit(9), own_exit(6))),
    *((11, uncond) for uncond in (0, own_exit(9))),
    *((10, uncond) for uncond in (5, 0, own_exit(8))),
    *((8, uncond) for uncond in (0, own_exit(6))),
    *((6, uncond) for uncond in (0, own_exit(4))),
    (4, 0),
    (2, 0),
)

experiment = replace(
    peers,
    calibration=CalibrationSettings(num_pictures=192, num_bands=8, batch_size=64, pairs=PAIRS),
    full_points=tuple(("unipc", steps) for steps in (5, 6, 7, 8, 10, 12, 20))
    + tuple(("ddim", steps) for steps in (10, 12, 20)),
    unguided_points=(*(("unipc", steps) for steps in (7, 10, 14, 20)), ("ddim", 20)),
    points=(("unipc", 10), ("unipc", 20), ("ddim", 20)),
    budgets=(0.35, 0.5, 0.6),
    controls=None,
    peers=(FasterCache(5, 2, 901), GuidanceInterval(0.5, 10.0)),
    witnesses=("vgg-cifar10",),
    num_blocks=10,
    num_images=200,
    batch_size=50,
    precision="bf16",
)
