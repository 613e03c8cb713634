"""CIFAR-10: train a backbone further from given weights, with a learning rate that falls to zero.

    dyndit train cifar10_on --model WEIGHTS --data DIR --out runs/cifar10-on        # resumable

WEIGHTS is a checkpoint of the recipe `cifar10`'s shape: 12 layers of width 192. Products run in bf16.

Measured: from a checkpoint of 3,468 steps of batch 128 this made `recipes/weights/cifar10`. FD-resnet20 of 400 pictures
at 10 UniPC steps fell from 11.9 to 10.4, FD-vgg from 13.5 to 11.6. It took 57 minutes, 1.7 s a step, on 2 cores of an
AMD EPYC with AVX-512 BF16 without other work, 2026-11-24.
"""

from dataclasses import replace

from dyndit.recipes.cifar10 import train as from_scratch

train = replace(
    from_scratch,
    fit=replace(
        from_scratch.fit,
        steps=2_000,
        learning_rate=3e-4,
        warmup_steps=50,
        ema_decay=0.998,
        checkpoint_every=200,
        precision="bf16",
        log_every=20,
    ),
)
