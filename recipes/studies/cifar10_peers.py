"""CIFAR-10: how do plans compare with every peer, on your backbone? `digits_peers` asks the same on the digits.

    dyndit compare cifar10_peers --model WEIGHTS --data DIR --extractor-weights resnet20-cifar10.safetensors \\
        --out runs/cifar10-peers                                     # resumable

WEIGHTS is the model of `dyndit train cifar10`, or any checkpoint of 32 x 32 pixels and 10 classes. DIR holds a
subfolder of pictures per class. FD-resnet20 scores 5 blocks of 1,000 pictures.

Result: not yet measured. Cost, counted: about 1,500 steps of full depth with guidance for each of 5,000 pictures. Use a
GPU (`--device cuda`); on 2 CPU cores it takes days.
"""

from dyndit.analysis.compare.experiment import Controls, Experiment
from dyndit.analysis.compare.peers import peers
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.cifar10 import distill, train

experiment = Experiment(
    model="",
    data="",
    extractor="resnet20-cifar10",
    train=train,
    distill=distill,
    calibration=CalibrationSettings(num_pictures=512, num_bands=10, batch_size=128),
    full_solvers=("dpmpp", "ddpm"),
    full_steps=(5, 6, 7, 8, 10, 12, 15, 20, 25),
    dynamic_steps=(10, 20),
    budgets=(0.45, 0.6, 0.75),
    unguided_steps=(5, 10, 20),
    controls=Controls(solver="ddim", steps=10, depths=(6,), num_shuffled=2),
    # The switch is left out: its small model would train for 40,000 steps, as the backbone did.
    peers=tuple(
        settings
        for peer in peers().values()
        if peer.available() and peer.name != "switch"
        for settings in peer.chosen()
    ),
    peer_steps=(10, 20),
    margin=0.03,
    num_blocks=5,
    num_images=1_000,
    batch_size=125,
)
