"""Digits: a DiT of 4 layers, as wide as the large one of 12. The peer `switch` trains the same one for its first steps.

    dyndit train digits_small --out runs/digits-small

Data, steps and settings are those of `digits`.

Measured as the first part of the switch (docs/results/peers): within 5 ms a picture the switch's lowest Fréchet
distance is 1.64, where searched plans have 1.35. Its training was part of the 11 minutes before that run's first arm,
and was not timed on its own.
"""

from dataclasses import replace

from dyndit.recipes.digits import train as large

train = replace(large, backbone=replace(large.backbone, num_blocks=4))
