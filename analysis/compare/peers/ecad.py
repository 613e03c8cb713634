"""Take parts of blocks from the step before: a schedule says which step, block and part, and which guidance.

ECAD (Aggarwal et al. 2025, "Evolutionary Caching to Accelerate Your Off-the-Shelf Diffusion Model", arXiv:2506.15682)
lets an evolution choose such schedules; `dyndit.analysis.compare.evolution` is ours. A part is a block's attention or
its MLP, before the block's gate, so the step's own gate and input still count. Both guidance branches have the same
schedule and a cache of their own. The genes for guidance are an addition: with them a schedule may save what a searched
plan may save.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings
from dyndit.clock import Clock
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.models.layers import DiTBlock, modulate
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Guide, Held, NoGuide
from dyndit.rounds import paired_times

BOTH, HOLD, ALONE = "phn"
"""First letter of a step: both branches run; the last guidance is held; nothing guides."""

Genome = tuple[str, ...]
"""A text per step: its guidance, then 1 (computed) or 0 (cached) for the attention and the MLP of every block. Example
for two blocks: "p1111" computes both branches in full, "h1000" computes the first block's attention alone."""

_GUIDES: dict[str, Guide] = {HOLD: Held(), ALONE: NoGuide()}


@dataclass(frozen=True)
class Ecad(PeerSettings):
    """every: compute all parts every `every` steps. hold: between them hold the guidance, without a second branch.

    genome: a schedule of its own, in place of the periodic one.
    """

    name: ClassVar[str] = "ecad"
    switched_off: ClassVar = {"every": 1}
    """Every part at every step."""
    compared: ClassVar = ((2,), (3,), (2, True), (3, True))
    """Periodic schedules, with and without held guidance."""
    least: ClassVar = {"every": 1}
    every: int = 2
    hold: bool = False
    genome: Genome = ()

    @property
    def label(self) -> str:
        """Return the period, or a hash of the genome, such as "genome-1f0a55c2"."""
        if not self.genome:
            return f"every{self.every}" + "-hold" * self.hold
        return f"genome-{hashlib.sha256(' '.join(self.genome).encode()).hexdigest()[:8]}"

    def schedule(self, num_steps: int, num_blocks: int) -> Genome:
        """Return a text per step. Raises InputError: the genome is of other steps or blocks, or has odd letters."""
        if not self.genome:
            whole, cached = BOTH + "11" * num_blocks, (HOLD if self.hold else BOTH) + "00" * num_blocks
            return tuple(cached if k % self.every else whole for k in range(num_steps))
        wanted = f"{num_steps} steps of a letter of {BOTH}{HOLD}{ALONE} and {2 * num_blocks} of 0 and 1"
        if len(self.genome) != num_steps:
            raise InputError(f"peer {self.name}: genome of {len(self.genome)} steps, expected {wanted}")
        for text in self.genome:
            letters = text[:1] in (BOTH, HOLD, ALONE) and set(text[1:]) <= {"0", "1"}
            if len(text) != 1 + 2 * num_blocks or not letters:
                raise InputError(f"peer {self.name}: genome with {text!r:.40}, expected {wanted}")
        return self.genome

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Make the peer. Raises InputError: a block is not the published one (adaLN-Zero)."""
        for block in model.backbone.block_modules():
            if type(block) is not DiTBlock:
                raise InputError(f"peer {self.name}: block {type(block).__name__}, expected a DiTBlock")
        return CachedParts(model, self)

    def plan(self, full: DepthPlan, depths: tuple[int, ...]) -> DepthPlan:
        """Guide as the schedule says. Steps that the full plan does not guide stay so."""
        steps = [
            replace(step, guide=_GUIDES[text[0]]) if text[0] in _GUIDES and step.guide != NoGuide() else step
            for step, text in zip(full.steps, self.schedule(full.num_steps, full.num_blocks), strict=True)
        ]
        return full.with_steps(steps, router=self.name)

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return the share of the parts that run, a block having two."""
        ran = run_of(self.schedule(plan.num_steps, plan.num_blocks), plan)
        whole = 2 * plan.whole.work().blocks * plan.num_steps
        return sum(branches * parts.count("1") for branches, parts in ran) / whole


def run_of(genome: Genome, plan: DepthPlan) -> list[tuple[int, str]]:
    """Return what runs at every step: the number of branches, and the parts as a text of 0 and 1.

    A branch that comes for the first time has no cache; then every part runs, in both branches.
    """
    seen, found = 0, []
    for text, step in zip(genome, plan.steps, strict=True):
        branches = len(step.work().depths)
        found.append((branches, text[1:] if branches <= seen else "1" * len(text[1:])))
        seen = max(seen, branches)
    return found


@dataclass(frozen=True)
class Memory:
    """parts: per branch the last output of every attention and MLP, (B, N, D). guided: as in `DynamicDepth`."""

    parts: tuple[tuple[Tensor, ...], ...] = ()
    guided: tuple[Tensor, Tensor] | None = None


class CachedParts(Peer):
    """Full depth in which a schedule's parts are computed, and the others taken from the step before."""

    settings: Ecad

    def predict(self, step: StepInputs, memory: Memory | None) -> tuple[list[Tensor], Memory]:
        """Predict every branch; guide by the last two branches' difference where guidance is held."""
        memory, num = memory or Memory(), len(step.branches)
        genes = self.settings.schedule(len(step.timesteps), self.num_blocks)[step.k][1:]
        kept = memory.parts[:num] if num <= len(memory.parts) else None
        joined = Inputs.joined(step.branches)
        state = self.backbone.embed(joined.x, joined.t, joined.y)
        tokens, outputs = state.tokens, []
        for index, block in enumerate(self.backbone.blocks):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(state.cond).chunk(6, dim=1)
            for part, gene in enumerate(genes[2 * index : 2 * index + 2]):
                if kept is not None and gene == "0":
                    outputs.append(torch.cat([branch[2 * index + part] for branch in kept]))
                elif part:
                    outputs.append(block.mlp(modulate(block.norm2(tokens), shift_m, scale_m)))
                else:
                    outputs.append(block.attn(modulate(block.norm1(tokens), shift_a, scale_a)))
                tokens = tokens + (gate_m if part else gate_a).unsqueeze(1) * outputs[-1]
        own = list(self.backbone.head(replace(state, tokens=tokens)).split(len(step.x_t)))
        parts = tuple(zip(*(output.split(len(step.x_t)) for output in outputs), strict=True))
        guided = memory.guided if num < 2 else (own[0], own[1])
        if step.work.held and memory.guided is not None:
            conditional, unconditional = (prediction.float() for prediction in memory.guided)
            own.append(own[0].float() - (conditional - unconditional))
        return own, Memory(parts + memory.parts[num:], guided)


@dataclass(frozen=True)
class PartShares:
    """Shares of a block's time that its attention and its MLP take; norms, modulation and gates take the rest."""

    attention: float
    mlp: float

    def step_seconds(self, cost: CostModel, branches: int, parts: str) -> float:
        """Predict the seconds of a step that runs these parts, a text of 0 and 1, in so many branches."""
        times = cost.one if branches == 1 else cost.two
        shares = (1 - self.attention - self.mlp, self.attention, self.mlp)
        blocks = 0.0
        for index in range(cost.num_blocks):
            ran = (1, *map(int, parts[2 * index : 2 * index + 2]))
            blocks += times.through(index, index + 1) * sum(r * share for r, share in zip(ran, shares, strict=True))
        return cost.solver + times.embed + blocks + times.head

    def seconds(self, cost: CostModel, genome: Genome, plan: DepthPlan) -> float:
        """Predict the seconds of a sampling of `cost.batch_size` pictures.  plan: what `Ecad.plan` returned."""
        ran = zip(plan.calls_by_step, run_of(genome, plan), strict=True)
        return sum(calls * self.step_seconds(cost, *what) for calls, what in ran)


@torch.no_grad()
def part_shares(model: DynamicDepth, batch_size: int, rounds: int = 15) -> PartShares:
    """Time the parts of the first block beside the whole block, in turn; medians."""
    first = next(model.parameters())
    example = model.backbone.example(batch_size, torch.Generator().manual_seed(0)).to(first)
    state, block = model.backbone.embed(example.x, example.t, example.y), model.backbone.blocks[0]
    arms = {
        "block": lambda: model.backbone.block(0, state),
        "attention": lambda: block.attn(state.tokens),
        "mlp": lambda: block.mlp(state.tokens),
    }
    timed = paired_times(arms, rounds=rounds, warmup=2, clock=Clock(first.device))
    seconds = timed.groupby("arm")["seconds"].median()
    shares = [seconds[name] / seconds["block"] for name in ("attention", "mlp")]
    most = max(1.0, sum(shares))  # parts alone may seem to take more than the block
    return PartShares(*(float(share / most) for share in shares))


def periodic(num_steps: int, num_blocks: int, periods: Sequence[int] = (1, 2, 3, 4, 5)) -> list[Genome]:
    """Return the periodic schedules, with and without held guidance: where an evolution begins."""
    settings = [Ecad(every, hold) for every in periods for hold in (False, True)]
    return list(dict.fromkeys(each.schedule(num_steps, num_blocks) for each in settings))
