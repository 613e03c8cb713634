"""CIFAR-10: train a backbone further from given weights, to 60 epochs in all, with a learning rate that falls to zero.

    export TIMM_FUSED_ATTN=0                                                                          # on a CPU
    dyndit train cifar10_on --model WEIGHTS --data DIR --out runs/cifar10-on                          # resumable

WEIGHTS is a checkpoint of the recipe `cifar10`'s shape: 12 layers of width 192. Products run in bf16, and the module is
compiled, which takes a C++ compiler on a CPU. TIMM_FUSED_ATTN=0 tells timm to write attention out: at 64 tokens in bf16
the backward of torch's fused attention is slow on CPUs (torch 2.14).

Measured: an earlier form of this recipe made `recipes/weights/cifar10`: 2,000 steps at 3e-4, EMA 0.998, not compiled,
from a checkpoint of 3,468 steps of batch 128. FD-resnet20 of 400 pictures at 10 UniPC steps fell from 11.9 to 10.4,
FD-vgg from 13.5 to 11.6. It took 57 minutes, 1.7 s a step, on 2 cores of an AMD EPYC with AVX-512 BF16 without other
work, 2026-11-24. The 18,000 steps: not yet measured.
"""

from dataclasses import replace

from dyndit.recipes.cifar10 import train as from_scratch

train = replace(
    from_scratch,
    fit=replace(
        from_scratch.fit,
        steps=18_000,
        learning_rate=8e-4,
        warmup_steps=300,
        ema_decay=0.9995,
        checkpoint_every=200,
        precision="bf16",
        log_every=20,
        compile=True,
    ),
)
