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
| strengths | steps may be guided half or twice as strongly |
| guides | exits after 3 and 5 blocks learn the unconditional prediction, and may guide in its place |
| slim | exits after 2, 4, 6 and 8 blocks alone, their MLP as wide as the backbone: 8% of its parameters |

Result: not yet measured.
"""

from dataclasses import replace

from torch import Tensor, nn

from dyndit.analysis.compare.experiment import Variant
from dyndit.models.base import Backbone
from dyndit.models.exits import HEADS, ExitConfig
from dyndit.models.layers import TANH_GELU, zero_linear
from dyndit.plans.descent import Descent
from dyndit.recipes.cifar10_frontier import CHOICES
from dyndit.recipes.studies import claim

NUMBER = 9
"""Number of the calibration; the claim's are 0 to 4."""
JOINED = "resnet20-cifar10+vgg-cifar10"
STRENGTHS = tuple(f"{step}*{f}" for step in ("12|6", "12|e4", "8|4", "8|e4", "6|e2") for f in ("0.5", "2"))
GUIDED = ("12|e5", "12|e3", "8|e5", "8|e3", "6|e5", "6|e3", "4|e3")


class SlimHead(nn.Module):
    """An MLP as wide as the backbone that no condition modulates, then a layer of the final layer's shape."""

    def __init__(self, backbone: Backbone, depth: int) -> None:
        super().__init__()
        self.final = backbone.new_exit_head()
        width, own = backbone.width, next(self.final.parameters())
        self.norm, self.act = nn.LayerNorm(width, eps=1e-6).to(own), TANH_GELU()
        self.fc1, self.fc2 = nn.Linear(width, width).to(own), nn.Linear(width, width).to(own)
        zero_linear(self.fc2)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Predict patches.  tokens: (B, N, D), cond: (B, D) -> (B, N, patch * patch * C_out)."""
        return self.final(tokens + self.fc2(self.act(self.fc1(self.norm(tokens)))), cond)


HEADS["slim"] = SlimHead

plain = claim.PROTOCOLS["main"].calibrated(NUMBER)
table, distill = plain.calibration, plain.distill
guides = replace(distill, exits=ExitConfig((2, 3, 4, 5, 6, 8)), guides=(3, 5))
slim = replace(distill, exits=ExitConfig((2, 4, 6, 8), "slim"))  # pyright: ignore[reportArgumentType]  registered above
experiment = replace(
    plain,
    more_extractors=("vgg-cifar10",),
    first_seed=20_000,
    num_blocks=5,
    num_images=500,
    time_batch=0,
    variants=(
        Variant("descent", descent=Descent()),
        Variant("joined", extractor=JOINED),
        Variant("joined-descent", extractor=JOINED, descent=Descent()),
        Variant("strengths", calibration=replace(table, choices=CHOICES + STRENGTHS)),
        Variant("guides", distill=guides, calibration=replace(table, choices=CHOICES + GUIDED)),
        Variant("slim", distill=slim),
    ),
)
