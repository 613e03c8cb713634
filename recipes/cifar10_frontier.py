"""CIFAR-10 on a CPU: plans at few steps of good solvers, against fewer steps and the strongest peers, by two judges.

    dyndit distill cifar10 --model TRUNK --data DIR --out runs/cifar10-exits
    dyndit compare cifar10_frontier --model runs/cifar10-exits --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10     # resumable

TRUNK is what `dyndit train cifar10` left, or any checkpoint of 32 x 32 pixels and 10 classes; DIR holds a subfolder of
pictures per class. Plans are searched on a table of 10 DDIM steps, whose bands serve 20 steps and UniPC; the second
judge, `vgg-cifar10`, sees the same pictures, and no plan was chosen by it. Products run in bf16, for every arm alike:
choose `precision="fp32"` on a machine without it.
"""

from dataclasses import replace

from dyndit.analysis.peers.faster_cache import FasterCache
from dyndit.analysis.peers.interval import GuidanceInterval
from dyndit.calibration import CalibrationSettings
from dyndit.recipes.cifar10_peers import experiment as peers

experiment = replace(
    peers,
    calibration=CalibrationSettings(num_pictures=256, num_bands=10, batch_size=64, num_depths=4, own_guides=True),
    full_solvers=(),
    full_steps=(5, 6, 7, 8, 10, 12, 14, 20),
    points=(("unipc", 10), ("unipc", 20), ("ddim", 20)),
    budgets=(0.35, 0.5, 0.65),
    unguided_steps=(10, 20),
    controls=None,
    peers=(FasterCache(5, 2), FasterCache(5, 2, 901), GuidanceInterval(0.5, 10.0)),
    witnesses=("vgg-cifar10",),
    num_blocks=5,
    num_images=400,
    batch_size=50,
    precision="bf16",
)
