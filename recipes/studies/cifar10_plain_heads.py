"""CIFAR-10: the exits of `cifar10_frontier` with plain heads in place of wide ones; all else alike.

    dyndit distill cifar10_plain_heads --model recipes/weights/cifar10 --data DIR --out runs/plain-heads

Its `exit-errors.csv` beside that of `cifar10_frontier` tells what the MLP before the projection brings.
"""

from dataclasses import replace

from dyndit.recipes.cifar10_frontier import distill as wide

distill = replace(wide, exits=replace(wide.exits, head="adaln-linear"))
