"""CIFAR-10: which exits give the claim a better searched plan? One change at a time, UniPC-20, budget 0.45.

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    dyndit compare claim_tries_exits --model recipes/weights/cifar10 --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-tries-exits  # resumable

The own plan has the claim's choices, and the exits of `claim_tries`, which learn for longer than the claim's. Each
variant has exits and a table of its own.

| variant | change |
|---|---|
| linear | forecasts extrapolate, in place of learning from what a full-depth step left |
| guides | exits after 3 and 5 blocks learn the unconditional prediction, and may guide in its place |
| slim | the exits' MLP is as wide as the backbone |
| longer | exits and forecasts learn for 4,000 updates, in place of 1,000 and 2,000 |

Result and minutes: not yet measured.
"""

from dataclasses import replace

from dyndit.analysis.compare.experiment import Variant
from dyndit.models.exits import ExitConfig
from dyndit.recipes.cifar10_frontier import experiment as frontier

NUMBER = 9
"""Number of the calibration, as in `claim_tries`; the claim's are 0 to 4."""
CHOICES = ("12|e4", "12|e4*2", "8|4", "8|e4*2", "6|e2", "4|e2", "2+|held", "2+|held*1.4")
GUIDED = ("12|e5", "12|e3", "8|e5", "8|e3", "6|e5", "6|e3", "4|e3")

point = (("unipc", 20),)
exits = frontier.distill
recall_fit = replace(exits.recall_fit, steps=2_000, precision=exits.fit.precision)
used = {"exits": ExitConfig((2, 4, 6, 8), recall=(2, 4)), "forecasts": False, "recall_fit": recall_fit}
plain = replace(
    frontier,
    distill=replace(exits, num_trajectories=1_024, cfg_scale=2.5, **used),
    calibration=replace(frontier.calibration, num_pictures=80, batch_size=80, choices=CHOICES, forecast_ages=2),
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
table, exits = plain.calibration, plain.distill
linear = replace(exits, exits=replace(exits.exits, recall=()), forecasts=True)
more_exits = replace(exits, exits=replace(exits.exits, layers=(2, 3, 4, 5, 6, 8)), guides=(3, 5))
slim = replace(exits, exits=replace(exits.exits, head="slim"))
longer = {"fit": replace(exits.fit, steps=4_000), "recall_fit": replace(exits.recall_fit, steps=4_000)}
experiment = replace(
    plain,
    first_seed=20_100,
    num_blocks=5,
    num_images=300,
    variants=(
        Variant("linear", distill=linear),
        Variant("guides", distill=more_exits, calibration=replace(table, choices=CHOICES + GUIDED)),
        Variant("slim", distill=slim),
        Variant("longer", distill=replace(exits, **longer)),
    ),
)
