"""Count arithmetic with torch's own counter: multiply-accumulates (MACs) and FLOPs.

The "119 Gflops" of DiT-XL/2 in papers are multiply-accumulates. `torch.utils.flop_counter` counts a multiplication and
an addition separately. Here FLOPs = 2 · MACs. As in the papers, matrix products, convolutions and attention count;
elementwise work (norms, activations, modulation) does not.

Only shapes matter, so the parts of a model are counted once, on one fake picture. The cost of a plan is then a sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.conditions import Condition, Conditioning
from dyndit.models.dynamic import DynamicDepth, Work
from dyndit.models.forecasts import NUM_TERMS
from dyndit.models.recall import Left
from dyndit.plans.plan import DepthPlan
from dyndit.sampling.sample import sample


def flops(macs: int) -> int:
    """Return FLOPs as torch counts them: a multiplication and an addition for each multiply-accumulate."""
    return 2 * macs


def _of_fused_linear(x: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    """Return the FLOPs of a linear map with its activation, as torch counts a linear map without."""
    return 2 * math.prod(out_shape) * x[-1]


def count_macs(run: Callable[[], object]) -> int:
    """Count the multiply-accumulates of `run`; compiled modules run eagerly."""
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # torch.utils.flop_counter does not know it
    known = {} if fused is None else {fused: _of_fused_linear}
    counting = FlopCounterMode(display=False, custom_mapping=known)
    with torch.compiler.set_stance("force_eager"), counting as counter:
        run()
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a model's parts for one row: one picture in one branch. Rows add up."""

    embed: int
    blocks: tuple[int, ...]
    leave: dict[int, int]
    """Counts of the exit head by depth; at full depth, of the model's own head."""
    tokens: int = 0
    """Length of the sequence that the blocks run on."""
    recall: dict[int, int] = field(default_factory=dict)
    """Counts of the head of learned forecasts by depth."""

    def branch(self, depth: int) -> int:
        """Count one branch of one picture up to `depth` blocks."""
        return self.embed + sum(self.blocks[:depth]) + self.leave[depth]

    @property
    def full(self) -> int:
        """Count one forward of the whole model for one picture, as in the papers' tables."""
        return self.branch(len(self.blocks))

    def plan(self, plan: DepthPlan) -> int:
        """Count the denoiser over a sampling of one picture. Raises InputError: a depth of the plan has no exit."""
        if missing := [depth for step in plan.steps for depth in step.exits if depth not in self.leave]:
            raise InputError(f"plan: depth {missing[0]}, this model leaves after one of {sorted(self.leave)}")
        return sum(n * self.work(work) for n, work in zip(plan.calls_by_step, plan.works, strict=True))

    def heads(self, plan: DepthPlan) -> int:
        """Count the exit heads alone over a sampling of one picture, without the model's own head."""
        return sum(n * self._heads(work) for n, work in zip(plan.calls_by_step, plan.works, strict=True))

    def work(self, work: Work) -> int:
        """Count one step of one picture: its branches, and the exit heads on the way."""
        depth = len(self.blocks)
        own = work.depths.count(depth) * self.leave[depth]
        return sum(self.embed + sum(self.blocks[:depth]) for depth in work.depths) + own + self._heads(work)

    def _heads(self, work: Work) -> int:
        """Count the exit heads that one picture runs at one step."""
        ends = [self._end(depth, work.forecast) for depth in work.depths if depth != len(self.blocks)]
        return sum(ends) + sum(self.leave[depth] for depth in work.heads_beside(self.recall))

    def _end(self, depth: int, forecast: bool) -> int:
        return self.recall[depth] if forecast and depth in self.recall else self.leave[depth]


def model_macs(model: DynamicDepth, inputs: Inputs | None = None) -> Macs:
    """Count the parts of a model on fake tensors, without computing them.

    inputs: a call of one row; None: an example. Raises InputError: `inputs` have several rows.
    """
    if inputs is not None and len(inputs) != 1:
        raise InputError(f"inputs: {len(inputs)} rows, expected 1")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        given = model.backbone.example(1).to(next(model.parameters())) if inputs is None else _faked(inputs, fake)
        states = []

        def embed() -> None:
            states.append(model.backbone.embed(given.x, given.t, given.y))

        embedding, blocks, leave, recall = count_macs(embed), [], {}, {}
        for index in range(model.num_blocks):
            blocks.append(count_macs(lambda index=index: states.append(model.backbone.block(index, states[-1]))))
            if index + 1 in model.depths:
                leave[index + 1] = count_macs(lambda depth=index + 1: model.leave(states[-1], depth))
        if model.exits is not None:
            exits, when, last = model.exits, torch.zeros(NUM_TERMS), states[-1].for_head()[0]
            for depth in exits.config.recall:
                left = Left(0.0, {depth: states[depth].for_head()[0], model.num_blocks: last})
                recall[depth] = count_macs(lambda d=depth, left=left: exits.recalled(states[d], d, left, when))
    return Macs(embedding, tuple(blocks), leave, states[0].tokens.shape[1], recall)


def plan_macs(model: DynamicDepth, plan: DepthPlan) -> int:
    """Count `Macs.plan` of a model. A model that does not follow its plan, such as a cache, needs `sampling_macs`."""
    return model_macs(model).plan(plan)


def sampling_macs(model: DynamicDepth, plan: DepthPlan, *, label: int = 0, seed: int = 0) -> int:
    """Count the same while drawing a real picture: right for any model, at the price of a sampling."""
    options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
    return count_macs(lambda: sample(model, [label], plan=plan, seed=seed, batch_size=1, **options))


def full_macs(model: DynamicDepth) -> int:
    """Count one forward at full depth for one picture in MACs (DiT-XL/2, 256 px: 118.6 G)."""
    return model_macs(model).full


def _faked(inputs: Inputs, fake: FakeTensorMode) -> Inputs:
    y: Condition = inputs.y
    if isinstance(y, Conditioning):
        shared = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in y.shared.items()}
        y = Conditioning({name: fake.from_tensor(value) for name, value in y.rows.items()}, shared)
    else:
        y = fake.from_tensor(y)
    return Inputs(fake.from_tensor(inputs.x), fake.from_tensor(inputs.t), y)
