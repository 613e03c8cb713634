"""CIFAR-10: train a backbone further from given weights, to 60 epochs in all, with a learning rate that falls to zero.

    export TIMM_FUSED_ATTN=0                                                                          # on a CPU
    dyndit train cifar10_on --model WEIGHTS --data DIR --out runs/cifar10-on                          # resumable

WEIGHTS is a checkpoint of the recipe `cifar10`'s shape: 12 layers of width 192. Products run in bf16, and the module is
compiled, which takes a C++ compiler on a CPU. TIMM_FUSED_ATTN=0 tells timm to write attention out: at 64 tokens in bf16
the backward of torch's fused attention is slow on CPUs (torch 2.14).

Measured: the 18,000 steps made `recipes/weights/cifar10`, from the backbone of 5,468 steps that was there before (its
last 2,000 steps by an earlier form of this recipe). Over 5 blocks of 1,000 pictures FD-resnet20 fell from 9.82 to 6.13,
FD-vgg from 9.40 to 3.61, FD-efficientnet-lite0 from 408 to 245 (its README has intervals and the command). 3.8 hours on
2 cores of an AMD EPYC with AVX-512 BF16, in parts beside other work; 1.66 steps a second without; 2026-11-29.
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
