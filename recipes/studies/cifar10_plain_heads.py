"""CIFAR-10: how much more do plain heads err than the wide heads of `cifar10_frontier`, all else equal?

    dyndit distill cifar10_plain_heads --model recipes/weights/cifar10 --data DIR --out runs/plain-heads

Compare its `exit-errors.csv` with the file of `cifar10_frontier`: the difference is the MLP before the projection.

Measured (docs/results/cifar10): a plain exit's error on the noise is 1.4 to 13 times a wide exit's after layer 2, 2.1
to 15 times after layer 4, 3.2 to 20 after layer 6, 5.4 to 16 after layer 8. Distilling took 3.9 minutes on 2 cores of
an AMD EPYC with AVX-512 BF16, 2026-11-28.
"""

from dataclasses import replace

from dyndit.recipes.cifar10_frontier import distill as wide

distill = replace(wide, exits=replace(wide.exits, head="adaln-linear"))
