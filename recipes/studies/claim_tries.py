"""CIFAR-10: what makes the searched plan of the claim better? One change at a time, UniPC-20, budget 0.45.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    dyndit compare claim_tries --model recipes/weights/cifar10 --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-tries        # resumable

The plain plan is a calibration of docs/results/claim/protocol.md, on seeds that the claim does not use, calibrated by
`resnet20-cifar10`. The primary extractor of the claim scores nothing here.

| variant | change |
|---|---|
| descent | measured descent from the searched plan, on 512 pictures of other seeds that share prefixes |
| joined | calibrated by `resnet20-cifar10` and `vgg-cifar10` at once |
| joined-descent | both |
| searches | the best of five searches, on those 512 pictures |
| scale | the searched plan at the guidance scale that does best on those 512 pictures |
| strengths | steps may be guided half or twice as strongly |
| guides | exits after 3 and 5 blocks learn the unconditional prediction, and may guide in its place |
| longer | exits after 2, 4, 6 and 8 blocks alone, which plans use, trained for 4,000 updates in place of 1,000 |
| slim | exits after 2, 4, 6 and 8 blocks alone, their MLP as wide as the backbone: 8% of its parameters |

Both extractors score the joined variants' pictures of fresh seeds, but both chose their plans.

Result and minutes: not yet measured.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.models.exits import ExitConfig
from dyndit.plans.descent import Descent
from dyndit.recipes.cifar10_frontier import CHOICES
from dyndit.recipes.cifar10_frontier import experiment as frontier

NUMBER = 9
"""Number of the calibration; the claim's are 0 to 4."""
JOINED = "resnet20-cifar10+vgg-cifar10"
STRENGTHS = tuple(f"{step}*{f}" for step in ("12|6", "12|e4", "8|4", "8|e4", "6|e2") for f in ("0.5", "2"))
GUIDED = ("12|e5", "12|e3", "8|e5", "8|e3", "6|e5", "6|e3", "4|e3")

point = (("unipc", 20),)
plain = replace(
    frontier,
    calibration=replace(frontier.calibration, num_pictures=128, batch_size=64),
    points=point,
    full_points=point,
    unguided_points=point,
    budgets=(0.45,),
    peers=(),
    metrics=("fd", "kid", "prc"),
    prc_members=5_000,
).calibrated(NUMBER)
table, distill = plain.calibration, plain.distill
used = ExitConfig((2, 4, 6, 8))
more_exits = replace(distill, exits=ExitConfig((2, 3, 4, 5, 6, 8)))
more_choices = replace(table, choices=CHOICES + GUIDED)
experiment = replace(
    plain,
    first_seed=20_000,
    num_blocks=5,
    num_images=500,
    variants=(
        Variant("descent", descent=Descent()),
        Variant("joined", extractor=JOINED),
        Variant("joined-descent", extractor=JOINED, descent=Descent()),
        Variant("searches", descent=Descent(rounds=0, searches=5)),
        Variant("scale", descent=Descent(rounds=0, scales=(1.25, 1.75, 2.0, 2.5, 3.0))),
        Variant("strengths", calibration=replace(table, choices=CHOICES + STRENGTHS)),
        Variant("guides", distill=replace(more_exits, guides=(3, 5)), calibration=more_choices),
        Variant("longer", distill=replace(distill, exits=used, fit=replace(distill.fit, steps=4_000))),
        Variant("slim", distill=replace(distill, exits=replace(used, head="slim"))),
    ),
)
