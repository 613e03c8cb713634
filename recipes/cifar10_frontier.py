"""CIFAR-10 on a CPU: compare plans at few steps of good solvers with fewer steps and the strongest peers.

    dyndit compare cifar10_frontier --model recipes/weights/cifar10 --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/cifar10     # resumable

The backbone is `recipes/weights/cifar10`, or any checkpoint of 32 x 32 pixels and 10 classes. DIR holds a
subfolder of pictures per class. The backbone's weights stay the same: wide exits are distilled beside them, with
forecasts of the gap to full depth. Plans are searched on a table of 10 DDIM steps with a band for each step. The table
serves 20 steps and UniPC too; two measured plans correct each prediction. A second extractor, `vgg-cifar10`, scores the
same pictures; no plan is chosen by it. Products run in bf16, for every arm and in distilling. On a machine that
only emulates bf16, add `--dtype float32`.

The peers are FasterCache, which led on the digits, and a guidance interval. Full depth without guidance is measured
too. The budgets lie below the 60% of the time that the field promises, so a plan that keeps quality saves more.

Measured on the backbone of 5,468 steps (docs/results/cifar10), quality unchanged to 3%: by the first extractor plans
save 70% of the time at 10 UniPC steps, 55% at 20 UniPC steps and 55% at 20 DDIM steps. By the second extractor they
save 45%, nothing and 43%. On 2 cores of an AMD EPYC with AVX-512 BF16, 2026-11-28: exits 8 minutes, table 15, sampling
of 10 blocks 139; the plans took 13 on 2026-11-24.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.compare.peers.faster_cache import FasterCache
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes import cifar10

# Exits after 9 to 11 layers are left out: the wide exit after 8 layers errs about as little as plain exits there.
# Below half of the time a second pass costs too much: most steps run one branch, alone or guided by its own exit.
CHOICES = (
    *("12|6", "12", "12|e6", "12|e4"),
    *("8|8", "8|4", "8", "8|e4"),
    *("6|6", "6", "6|e4", "6|e2"),
    *("4", "4|e2", "2"),
    *("2+", "2+|held", "4+", "4+|held"),
)

distill = replace(cifar10.distill, fit=replace(cifar10.distill.fit, precision="bf16"), forecasts=True)
experiment = Experiment(
    model="",
    data="",
    extractor="resnet20-cifar10",
    train=cifar10.train,
    distill=distill,
    calibration=CalibrationSettings(num_pictures=160, num_bands=10, batch_size=80, choices=CHOICES, forecast_ages=2),
    refinements=2,
    full_points=tuple(("unipc", steps) for steps in (5, 7, 10, 12, 20))
    + tuple(("ddim", steps) for steps in (10, 12, 20)),
    unguided_points=(*(("unipc", steps) for steps in (10, 14, 20)), ("ddim", 20)),
    points=(("unipc", 10), ("unipc", 20), ("ddim", 20)),
    budgets=(0.3, 0.45, 0.58),
    peers=(FasterCache(5, 2, 901), GuidanceInterval(0.5, 10.0)),
    more_extractors=("vgg-cifar10",),
    margin=0.03,
    num_blocks=10,
    num_images=500,
    batch_size=50,
    precision="bf16",
    # No effect beside the points above. The published runs are identified by these settings too.
    full_solvers=("dpmpp", "ddpm"),
    full_steps=(5, 6, 7, 8, 10, 12, 15, 20, 25),
    dynamic_steps=(10, 20),
    unguided_steps=(5, 10, 20),
    peer_steps=(10, 20),
)
