"""A 4-layer class-conditional DiT for scikit-learn's digits, as wide as the large one: the first half of a switch.

    dyndit train digits_small --out runs/digits-small

Same data, steps and settings as `digits`, a third of the blocks. Result and cost: not yet measured on its own.
"""

from dataclasses import replace

from dyndit.recipes.digits import train as large

train = replace(large, backbone=replace(large.backbone, num_blocks=4))
