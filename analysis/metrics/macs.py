"""Cost in arithmetic: multiply-accumulates (MACs) and FLOPs, counted by torch's own counter.

The field's "119 Gflops" of DiT-XL/2 are multiply-accumulates; `torch.utils.flop_counter` counts a multiplication and
an addition apart. Here one is always twice the other, and both are named: FLOPs = 2 · MACs. What is counted are the
products of matrices, convolutions and attention; elementwise work (norms, activations, modulation) is not, as in the
papers.

Shapes alone decide, so the parts of a model are counted once, on one fake picture, without computing anything; a plan
is then a sum.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.conditions import Condition, Conditioning
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.work import Work
from dyndit.plans.plan import DepthPlan
from dyndit.sampling.sample import sample


def flops(macs: int) -> int:
    """FLOPs as torch counts them: a multiplication and an addition for each multiply-accumulate."""
    return 2 * macs


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of whatever `run` computes, eagerly even where modules are compiled."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of the parts of a model for one row: one picture in one branch. Rows add up."""

    embed: int
    blocks: tuple[int, ...]
    leave: dict[int, int]
    """By depth: the exit head, or at full depth the model's own head."""

    def branch(self, depth: int) -> int:
        """One branch of one picture down to `depth`."""
        return self.embed + sum(self.blocks[:depth]) + self.leave[depth]

    @property
    def full(self) -> int:
        """One forward of the whole model for one picture: what the papers' tables give."""
        return self.branch(len(self.blocks))

    def plan(self, plan: DepthPlan) -> int:
        """The denoiser over a whole sampling of one picture: both branches, at every step, to where they leave, and the
        heads of the exits that guide, or that later steps forecast from.

        Raises:
            InputError: the plan leaves where this model has no exit.
        """
        if missing := [depth for step in plan.steps for depth in step.exits if depth not in self.leave]:
            raise InputError(f"plan: depth {missing[0]}, this model leaves after one of {sorted(self.leave)}")
        return sum(map(self.work, plan.works))

    def work(self, work: Work) -> int:
        """One step of one picture: its branches, and the exit heads that run on the way."""
        return sum(map(self.branch, work.depths)) + sum(self.leave[depth] for depth in work.heads_on_the_way)


def model_macs(model: DynamicDepth, inputs: Inputs | None = None) -> Macs:
    """Count the parts of a model, on fake tensors: nothing is computed, whatever the model's size.

    inputs: a call of one row, for families that take more than labels (prompt embeddings); made up otherwise.

    Raises:
        InputError: `inputs` are of several rows.
    """
    if inputs is not None and len(inputs) != 1:
        raise InputError(f"inputs: {len(inputs)} rows, expected 1")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        given = _one_row(model) if inputs is None else _faked(inputs, fake)
        states = []

        def embed() -> None:
            states.append(model.backbone.embed(given.x, given.t, given.y))

        embedding, blocks, leave = count_macs(embed), [], {}
        for index in range(model.num_blocks):
            blocks.append(count_macs(lambda index=index: states.append(model.backbone.block(index, states[-1]))))
            if index + 1 in model.depths:
                leave[index + 1] = count_macs(lambda depth=index + 1: model.leave(states[-1], depth))
    return Macs(embedding, tuple(blocks), leave)


def plan_macs(model: DynamicDepth, plan: DepthPlan) -> int:
    """Multiply-accumulates of the denoiser over one sampling of one picture under a plan.

    Of many plans, count the model once: `model_macs(model).plan(plan)`. A model that does other than its plan says (a
    cache, which may decide on the data) is counted by `sampling_macs`.
    """
    return model_macs(model).plan(plan)


def sampling_macs(model: DynamicDepth, plan: DepthPlan, *, label: int = 0, seed: int = 0) -> int:
    """The same, counted while a picture is really drawn: right for any model, at the price of a sampling."""
    options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
    return count_macs(lambda: sample(model, [label], plan=plan, seed=seed, batch_size=1, **options))


def full_macs(model: DynamicDepth) -> int:
    """Multiply-accumulates of one forward at full depth for one picture (DiT-XL/2, 256 px: 118.6 G)."""
    return model_macs(model).full


def _one_row(model: DynamicDepth) -> Inputs:
    """An example call of one row, inside the fake mode."""
    return model.backbone.example(1).to(next(model.parameters()))


def _faked(inputs: Inputs, fake: FakeTensorMode) -> Inputs:
    y: Condition = inputs.y
    if isinstance(y, Conditioning):
        shared = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in y.shared.items()}
        y = Conditioning({name: fake.from_tensor(value) for name, value in y.rows.items()}, shared)
    else:
        y = fake.from_tensor(y)
    return Inputs(fake.from_tensor(inputs.x), fake.from_tensor(inputs.t), y)
