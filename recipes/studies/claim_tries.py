"""CIFAR-10: what makes the searched plan of the claim better? One change at a time, UniPC-20, budget 0.45.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    dyndit compare claim_tries --model recipes/weights/cifar10 --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-tries        # resumable

Plans are made as in docs/results/claim/protocol.md, on seeds that the claim does not use, calibrated by
`resnet20-cifar10`. They are guided at scale 2.5, about what full depth does best at by that extractor. The claim tunes
it. Its primary extractor scores nothing here. The own plan may guide steps twice as strongly, and hold 0.7 or 1.4 times
of the guidance.

| variant | change |
|---|---|
| plain | every step is guided as strongly as the scale says |
| searches | the best of five searches, on 512 pictures of other seeds |
| descent | measured descent from the searched plan, on those pictures, which share prefixes |
| joined | calibrated by `resnet20-cifar10` and `vgg-cifar10` at once |
| joined-plain | both |

Both extractors score the joined variants' pictures of fresh seeds, but both chose their plans. `claim_fitted`
changes the exits in place of the plan.

Measured (docs/results/claim-tries): strengths gain 1.34 ± 0.21 of FD-resnet20 and 0.36 ± 0.25 of FD-vgg, and the own
plan differs from full depth by -0.02 ± 0.32 and +0.24 ± 0.38 in 43% of its time. Five searches find one plan; descent
gains nothing on fresh pictures; joined extractors lose. On 2 cores of an Intel Xeon with AMX, 2026-11-29: a table 11
minutes, sampling 18; the exits were not timed alone.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.models.exits import ExitConfig
from dyndit.plans.descent import Descent
from dyndit.recipes.cifar10_frontier import experiment as frontier

NUMBER = 9
"""Number of the calibration; the claim's are 0 to 4."""
JOINED = "resnet20-cifar10+vgg-cifar10"
CHOICES = ("12|e4", "12", "8|4", "8|e4", "6|e2", "4|e2", "2+", "2+|held")
STRENGTHS = ("12|e4*2", "8|e4*2", "2+|held*0.7", "2+|held*1.4")

point = (("unipc", 20),)
used = ExitConfig((2, 4, 6, 8), recall=(2, 4))
exits = frontier.distill
recall_fit = replace(exits.recall_fit, steps=2_000, precision=exits.fit.precision)
exits = replace(exits, exits=used, forecasts=False, num_trajectories=1_024, cfg_scale=2.5, recall_fit=recall_fit)
calibration = replace(frontier.calibration, num_pictures=80, batch_size=80, forecast_ages=2)
plain = replace(
    frontier,
    distill=exits,
    calibration=replace(calibration, choices=CHOICES),
    points=point,
    full_points=point,
    unguided_points=(),
    unguided_steps=(),
    budgets=(0.45,),
    cfg_scale=2.5,
    peers=(),
    metrics=("fd", "kid", "prc"),
    prc_members=5_000,
).calibrated(NUMBER)
strong = replace(plain.calibration, choices=CHOICES + STRENGTHS)
experiment = replace(
    plain,
    calibration=strong,
    first_seed=20_000,
    num_blocks=5,
    num_images=300,
    variants=(
        Variant("plain", calibration=plain.calibration),
        Variant("searches", descent=Descent(rounds=0, searches=5)),
        Variant("descent", descent=Descent(rounds=3, width=8)),
        Variant("joined", extractor=JOINED),
        Variant("joined-plain", extractor=JOINED, calibration=plain.calibration),
    ),
)
