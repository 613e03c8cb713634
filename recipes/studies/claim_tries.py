"""CIFAR-10: what makes the searched plan of the claim better? One change at a time, UniPC-20, budget 0.45.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    dyndit compare claim_tries --model recipes/weights/cifar10 --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-tries        # resumable

The plain plan is a calibration of docs/results/claim/protocol.md, on seeds that the claim does not use, calibrated by
`resnet20-cifar10`. It is guided at scale 2.5, about what full depth does best at by that extractor. The claim tunes it.
The primary extractor of the claim scores nothing here.

| variant | change |
|---|---|
| descent | measured descent from the searched plan, on 512 pictures of other seeds that share prefixes |
| joined | calibrated by `resnet20-cifar10` and `vgg-cifar10` at once |
| joined-descent | both |
| searches | the best of five searches, on those 512 pictures |
| scale | the searched plan at the guidance scale that does best on those 512 pictures |
| strengths | steps may be guided half or twice as strongly, forecasts 0.7 or 1.4 times |

Both extractors score the joined variants' pictures of fresh seeds, but both chose their plans. `claim_tries_exits`
changes the exits in place of the plan.

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
STRENGTHS += ("2+|held*0.7", "2+|held*1.4")

point = (("unipc", 20),)
used = ExitConfig((2, 4, 6, 8), recall=(2, 4))
exits = frontier.distill
recall_fit = replace(exits.recall_fit, steps=2_000, precision=exits.fit.precision)
exits = replace(exits, exits=used, forecasts=False, num_trajectories=1_024, cfg_scale=2.5, recall_fit=recall_fit)
plain = replace(
    frontier,
    distill=exits,
    calibration=replace(frontier.calibration, num_pictures=80, batch_size=80, forecast_ages=3),
    points=point,
    full_points=point,
    unguided_points=point,
    budgets=(0.45,),
    cfg_scale=2.5,
    peers=(),
    metrics=("fd", "kid", "prc"),
    prc_members=5_000,
).calibrated(NUMBER)
table = plain.calibration
experiment = replace(
    plain,
    first_seed=20_000,
    num_blocks=5,
    num_images=400,
    variants=(
        Variant("descent", descent=Descent()),
        Variant("joined", extractor=JOINED),
        Variant("joined-descent", extractor=JOINED, descent=Descent()),
        Variant("searches", descent=Descent(rounds=0, searches=5)),
        Variant("scale", descent=Descent(rounds=0, scales=(1.25, 1.75, 2.0, 2.5, 3.0))),
        Variant("strengths", calibration=replace(table, choices=CHOICES + STRENGTHS)),
    ),
)
