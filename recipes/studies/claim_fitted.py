"""CIFAR-10: do exits serve a plan better once they are fitted to it, jointly with its guidance?

    export TIMM_FUSED_ATTN=0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1                               # on a CPU
    python -m dyndit.recipes.studies.claim_fitted --model runs/claim-heads/wide/model --data DIR \\
        --extractor-weights resnet20-cifar10.safetensors --out runs/claim-fitted \\
        --plans docs/results/claim/plans-?/plans/plan-*.json                                       # resumable

Distilling trains every exit by itself, on noised pictures of every timestep, to predict what full depth predicts. A
plan uses an exit at few of its steps, and mostly in a pair: an exit guides full depth or a deeper exit, or a learned
forecast stands under a difference that is held. Guidance multiplies what the pair errs by.

Here a plan that was searched stays as it is, and its exits learn on: at the plan's own steps, on the states that it
passes through, with what its earlier steps left. What they learn is the step's whole prediction, guided and clamped:
it is to be what full depth predicts there, guided by the unconditional pass at the plan's scale. Each step's squared
error is divided by its mean before the training. The backbone stays frozen. The states are those that the plan passes
through with the exits as distilled; they are not drawn anew as the exits change (as DAgger would, arXiv:1011.0686).

The plans are the five that the claim's calibrations searched; the model is the backbone with one set of the claim's
exits, here the wide ones that `claim_heads` leaves. Every plan is fitted by itself and draws the same noise and labels
with the exits as distilled and as fitted; the arms take turns batch by batch.

A difference is fitted less distilled, paired by plan; its interval is over plans. Fixed before the run: fitted exits
are better if the upper limit of the difference is below zero by both extractors. The claim's primary extractor scores
nothing here. What remains of the steps' errors is measured on trajectories that no exit was fitted on.

Result and minutes: not yet measured.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from dyndit import manifest
from dyndit.analysis.compare.blocks import drawn_in_blocks
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.models.base import Inputs
from dyndit.models.conditions import Conditioning
from dyndit.models.dynamic import DynamicDepth, StepInputs, Work
from dyndit.models.exits import Exits
from dyndit.models.forecasts import Gaps
from dyndit.models.memory import Memory
from dyndit.models.recall import Left
from dyndit.pictures.check import cache_folder
from dyndit.plans.plan import DepthPlan, bind
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.sample import sample
from dyndit.stats import paired_interval
from dyndit.storage import load as checkpoints
from dyndit.training.borrowed import borrowed
from dyndit.training.config import FitConfig
from dyndit.training.data import open_data
from dyndit.training.fit import Task, fit

SEED, STATES_SEED, FRESH_SEED = 23_000, 2_300_000, 2_400_000
"""Of pictures, and of the trajectories to fit on and to measure errors on; no comparison has them."""
BATCH, STEPS_AT_ONCE = 50, 4
ROWS = "fitted.csv"
Precision = Literal["fp32", "bf16"]
fitting = FitConfig(
    steps=500, batch_size=128, learning_rate=3e-4, warmup_steps=25, schedule="cosine", ema_decay=0.98, flip=False
)
"""Updates of a plan's exits. Each is over `STEPS_AT_ONCE` of the plan's steps."""


class _Watched(DynamicDepth):
    """Note the inputs and the memory of every step."""

    seen: list[tuple[StepInputs, Memory | None]]

    def predict(self, step: StepInputs, memory: Any) -> tuple[list[Tensor], Any]:
        """See `DynamicDepth.predict`."""
        self.seen.append((step, memory))
        return super().predict(step, memory)


@dataclass(eq=False)
class Visits:
    """The states that R pictures pass through under a plan, and what full depth predicts there. Item i is picture i.

    by_step: the steps at which an exit or a forecast predicts; see `visits`. Their inputs and memories have R rows.
    """

    by_step: dict[int, tuple[StepInputs, Memory, Tensor]]
    fingerprint: str
    num: int
    can_flip: bool = False
    scales: dict[int, float] = field(default_factory=dict)
    """By which the error of a step is divided."""

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor(index), 0


def visits(model: DynamicDepth, plan: DepthPlan, num: int, seed: int) -> Visits:
    """Draw `num` pictures under a plan, classes in turn, and keep what its exits see. Targets: (R, C, H, W)."""
    watched = _Watched(model.backbone, model.exits, pixel_space=model.pixel_space, process=model.process).eval()
    watched.seen = []
    sample(watched, model.backbone.condition.in_turn(num), plan=plan, seed=seed, batch_size=BATCH)
    steps = {}
    for k, step in enumerate(plan.steps):
        if not (step.forecast or any(depth < plan.num_blocks for depth in step.exits)):
            continue
        calls = [(asked, memory or Memory()) for asked, memory in watched.seen if asked.k == k]
        branches = tuple(map(Inputs.joined, zip(*(asked.branches for asked, _ in calls), strict=True)))
        used = [_used(memory, asked.work) for asked, memory in calls]
        asked = replace(calls[0][0], branches=branches)
        with torch.no_grad():
            parts = [_targets(model, plan, one) for one, _ in calls]
        steps[k] = asked, _memory(torch.cat, *used), torch.cat(parts)
    key = f"{' '.join(map(str, (plan.solver, plan.cfg_scale, *plan.steps)))} {model.identity} {num} {seed}"
    return Visits(steps, key, num)


def _used(memory: Memory, work: Work) -> Memory:
    """Drop what a step does not read."""
    return Memory(
        memory.gaps * work.forecast, memory.left if work.forecast else None, memory.guided if work.held else None
    )


def _memory(do: Callable[[list[Tensor]], Tensor], *parts: Memory) -> Memory:
    """Make a memory of what `do` makes of the parts' tensors."""
    first = parts[0]
    gaps = tuple(
        Gaps(one.timestep, {d: do([part.gaps[i].by_depth[d] for part in parts]) for d in one.by_depth})
        for i, one in enumerate(first.gaps)
    )
    left = None
    if lefts := [part.left for part in parts if part.left is not None]:
        left = Left(lefts[0].timestep, {d: do([one.tokens[d] for one in lefts]) for d in lefts[0].tokens})
    pairs = [part.guided for part in parts if part.guided is not None]
    guided = (do([c for c, _ in pairs]), do([u for _, u in pairs])) if pairs else None
    return Memory(gaps, left, guided)


def _targets(model: DynamicDepth, plan: DepthPlan, step: StepInputs) -> Tensor:
    """Return what full depth predicts at a step, guided by its pass, with the plan's scale."""
    asked = step.branches[0]
    branches = asked, replace(asked, y=model.backbone.condition.null(asked.y))
    full = replace(step, branches=branches, work=Work((model.num_blocks,) * 2))
    return predicted(model, plan, full, Memory())


def predicted(model: DynamicDepth, plan: DepthPlan, step: StepInputs, memory: Memory) -> Tensor:
    """Return what the solver is given at a step, without variance.  -> (B, C, H, W)."""
    channels = model.backbone.in_channels
    predictions, _ = model.predict(step, memory)
    one = predictions[0]
    if len(predictions) == 2:
        one = Guidance(plan.cfg_scale).combine(one, predictions[1], channels)
    if model.pixel_space:
        one = model.process.clamp(one, step.x_t, step.timesteps[step.k], channels)
    return one[:, :channels]


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    y = inputs.y
    y = y.select(rows) if isinstance(y, Conditioning) else y[rows]
    return Inputs(inputs.x[rows], inputs.t[rows], y)


class Steps(nn.Module):
    """Register the exits as parameters. Keep the backbone out of the optimiser, the EMA and the checkpoints."""

    def __init__(self, model: DynamicDepth, plan: DepthPlan, states: Visits) -> None:
        super().__init__()
        self.exits, self.plan, self.states = model.exits, plan, states
        self.model = [model]

    def forward(self, k: int, rows: Tensor) -> Tensor:
        """Return the squared error of step k for pictures `rows`, (B,)."""
        step, memory, targets = self.states.by_step[k]
        branches = tuple(_rows(one, rows) for one in step.branches)
        memory = _memory(lambda parts: parts[0][rows], memory)
        found = predicted(self.model[0], self.plan, replace(step, branches=branches), memory)
        return (found.float() - targets[rows]).square().flatten(1).mean(1)


class Fitting(Task):
    """Task: at steps of a plan, predict what full depth predicts."""

    def __init__(self, steps: Steps) -> None:
        self.trainable: Any = steps

    def draw(self, x: Tensor, y: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Draw a few of the plan's steps and share the pictures out among them.  x: (B,) numbers."""
        known = torch.tensor(list(self.trainable.states.by_step))
        few = known[torch.randint(len(known), (STEPS_AT_ONCE,), generator=generator)]
        return x, few.repeat_interleave(-(-len(x) // STEPS_AT_ONCE))[: len(x)]

    def loss(self, module: nn.Module, x: Tensor, y: Any, _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean error, each step's divided by its scale.  x, y: pictures and steps, (B,)."""
        scales = self.trainable.states.scales
        errors = torch.cat([module(k, x[y == k]) / scales[k] for k in y.unique().tolist()])
        return errors.mean(), {}


@torch.no_grad()
def errors(model: DynamicDepth, plan: DepthPlan, states: Visits) -> dict[int, float]:
    """Return the mean squared error of each step in `states`."""
    steps = Steps(model, plan, states)
    parts = torch.arange(len(states)).split(BATCH)
    return {k: float(torch.cat([steps(k, rows) for rows in parts]).mean()) for k in states.by_step}


def fitted(
    model: DynamicDepth, plan: DepthPlan, out: Path, precision: Precision, num: int, config: FitConfig
) -> DynamicDepth:
    """Fit a copy of the model's exits to a plan, or load it from `out`; print what is left of the steps' errors."""
    assert model.exits is not None
    exits: Exits = copy.deepcopy(model.exits)
    own = DynamicDepth(model.backbone, exits, pixel_space=model.pixel_space, process=model.process).eval()
    if not (out / "model" / checkpoints.EXITS).exists():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            states, fresh = visits(model, plan, num, STATES_SEED), visits(model, plan, BATCH, FRESH_SEED)
            states.scales, before = errors(model, plan, states), errors(model, plan, fresh)
        with borrowed(model.backbone):
            exits.requires_grad_(True)
            task = Fitting(Steps(own, plan, states))
            result = fit(task, states, replace(config, precision=precision), out, identity=states.fingerprint)
            task.trainable.load_state_dict(result.ema)
            exits.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            after = errors(own, plan, fresh)
        for k, error in after.items():
            print(f"  step {plan.steps[k]!s} at {plan.timesteps[k]}: error {error / before[k]:.3f} of {before[k]:.2e}")
        checkpoints.save(own, out / "model")
    return checkpoints.load(out / "model")


def drawn(model: DynamicDepth, plan: DepthPlan, precision: Precision, block: int, batch: int) -> Tensor:
    """Draw a batch of pictures."""
    labels = model.backbone.condition.in_turn(BATCH, batch * BATCH)
    how: dict[str, Any] = {"seed": SEED + block, "first_index": batch * BATCH, "batch_size": BATCH, "progress": False}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return sample(model, labels, plan=plan, **how).pictures


def main(
    model: str,
    data: str,
    extractor_weights: Path,
    plans: tuple[Path, ...],
    out: Path,
    num_states: int = 500,
    num_images: int = 300,
    num_blocks: int = 4,
    precision: Precision = "bf16",
    updates: int = fitting.steps,
) -> None:
    """Fit the exits to every plan, draw `num_blocks` times `num_images` pictures with and without, and compare."""
    distilled, pictures = checkpoints.load(model), open_data(data, 32, 3)
    extractors = [load_extractor("resnet20-cifar10", extractor_weights), load_extractor("vgg-cifar10")]
    read = {f"plan{k}": replace(DepthPlan.load(file), exits="") for k, file in enumerate(plans)}
    settings = {"backbone": distilled.identity.backbone, "exits": distilled.identity.exits}
    settings |= {"plans": [" ".join(map(str, (plan.solver, plan.cfg_scale, *plan.steps))) for plan in read.values()]}
    settings |= {"num_states": num_states, "num_images": num_images, "precision": precision, "updates": updates}
    settings |= {"data": pictures.fingerprint, "extractors": [one.fingerprint for one in extractors]}
    manifest.claim(out, settings)
    config = replace(fitting, steps=updates)
    arms = {}
    for name, plan in read.items():
        print(f"{name}: {' '.join(map(str, plan.steps))}", flush=True)
        own = fitted(distilled, bind(plan, distilled), out / name, precision, num_states, config)
        for exits, one in (("distilled", distilled), ("fitted", own)):
            arms[exits, name] = partial(drawn, one, bind(plan, one), precision)
    real = [Measured(PictureSet(data, pictures), one, cache=cache_folder()) for one in extractors]
    rows = drawn_in_blocks(out / ROWS, ("exits", "plan"), arms, real, (num_blocks, num_images // BATCH))
    means = rows.groupby(["exits", "plan"]).mean(numeric_only=True).drop(columns="block")
    print(means.round(3).to_string())
    for name in map(str, means):
        one = paired_interval(means.loc["fitted", name], means.loc["distilled", name])
        print(f"{name}: {one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})")


if __name__ == "__main__":
    tyro.cli(main)
