"""Digits: a DiT of 4 layers, as wide as the large model of 12. The peer `switch` trains the same small model.

    dyndit train digits_small --out runs/digits-small

Data, steps and settings come from `digits`.

Measured as the first part of the switch (docs/results/peers): within 5 ms a picture the switch's lowest Fréchet
distance is 1.64; searched plans have 1.35. The training was part of the 11 minutes before that run's first arm, and
was not timed alone.
"""

from dataclasses import replace

from dyndit.recipes.digits import train as large

train = replace(large, backbone=replace(large.backbone, num_blocks=4))
