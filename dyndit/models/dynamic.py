"""DynamicDepth: a backbone, its exits, and the one loop that runs a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers import ModelMixin
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.base import Backbone, Inputs, State
from dyndit.models.conditions import Condition
from dyndit.models.exits import Exits
from dyndit.models.forecasts import basis, forecast_gap, remembered
from dyndit.models.identity import VERSION_1, AutoencoderRecord, Identity, check, identity_of, sketch, tensors_hash
from dyndit.models.memory import Memory
from dyndit.models.own import check_backbone
from dyndit.models.recall import Left
from dyndit.models.storing import OPTIONS_OF_DIFFUSERS, Storage
from dyndit.process import Process
from dyndit.progress import progress_bar


@dataclass(frozen=True)
class Work:
    """The branches and heads of one step.

    Example: `Work((12, 6))` runs 12 blocks with the condition and 6 without it; `Work((8,), own_exit=4)` runs 8 blocks
    and, on the way, the exit head after block 4.
    """

    depths: tuple[int, ...]
    """Blocks that each branch runs: the conditional branch first, then the unconditional branch if it runs."""
    own_exit: int = 0
    """Depth of the conditional branch's exit that guides it; 0: no exit guides it."""
    held: bool = False
    """Guide by the difference between both branches at the last step that ran both branches."""
    forecast: bool = False
    """Add a forecast of the gap to full depth to the conditional exit's prediction."""
    strength: float = 1.0
    """Factor of the guidance: the guiding prediction moves away from the conditional one by it."""
    kept: tuple[int, ...] = ()
    """Exits whose forecasts at later steps build on this step, rising. Heads of those that extrapolate run at it."""

    @property
    def blocks(self) -> int:
        """Return the number of blocks run, summed over all branches."""
        return sum(self.depths)

    @property
    def heads_on_the_way(self) -> tuple[int, ...]:
        """Return the exit heads that run without ending a branch, in rising order, if all forecasts extrapolate."""
        return self.heads_beside(())

    def heads_beside(self, recall: Collection[int]) -> tuple[int, ...]:
        """Return the same for a model whose forecasts at the depths `recall` are learned: they need no exit head."""
        return tuple(sorted({*self.kept} - {*recall} | ({self.own_exit} if self.own_exit else set())))

    def strengthened(self, conditional: Tensor, guide: Tensor) -> Tensor:
        """Move the guiding prediction away from the conditional one, both (B, C_out, ...); by 1 it stays, bit for bit.

        Guidance at any scale s then adds strength * (s - 1) times their difference: no caller has to know of it.
        """
        if self.strength == 1:
            return guide
        return conditional.float() - self.strength * (conditional.float() - guide.float())

    def keeping(self, depths: tuple[int, ...]) -> Self:
        """Return this work with what forecasts at these exits need remembered too."""
        return replace(self, kept=tuple(sorted({*self.kept, *depths})))


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a model at one step of the sampling loop.

    k: the step, from 0. branches: the inputs of each branch, the conditional branch first. Their x has the scale and
    the precision that the network takes. work: blocks and heads to run, one depth per branch. timesteps: all timesteps
    of the sampling, falling, as plain floats. uncond_first: stack the unconditional rows first if depths are equal.
    """

    k: int
    branches: tuple[Inputs, ...]
    work: Work
    timesteps: tuple[float, ...]
    uncond_first: bool = False

    @property
    def x_t(self) -> Tensor:
        """Return the conditional branch's pictures, (B, C, H, W)."""
        return self.branches[0].x

    @property
    def times(self) -> Tensor:
        """Return the conditional branch's timesteps, (B,)."""
        return self.branches[0].t

    @property
    def labels(self) -> tuple[Condition, ...]:
        """Return the condition of each branch."""
        return tuple(branch.y for branch in self.branches)


class DynamicDepth(ModelMixin):
    """A backbone that may leave early through an exit. Depth L is the original model, bit for bit.

        model = dyndit.DynamicDepth(MyDiT())           # a backbone of your own; dyndit.load opens saved ones
        model(x, t, y)                                 # full depth
        model(x, t, y, depth=6)                        # the exit after block 6
        model.save_pretrained("runs/mine")

    A `ModelMixin`, so that pipelines of diffusers save and load it among their components, as a native folder.
    """

    storage: ClassVar[Any] = None
    """A `Storage`; None before `dyndit.storage.pretrained` sets it."""

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self:  # pyright: ignore[reportIncompatibleVariableOverride]
            """See `nn.Module`. diffusers wraps it so that checkers lose its arguments."""
            ...

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None = None,
        *,
        pixel_space: bool = True,
        process: Process | None = None,
    ) -> None:
        """Make a model of a backbone. A user's own backbone is checked on one call of two rows.

        exits: `Exits(backbone, ExitConfig())`, or None: full depth alone, until `Distill` trains some. process: default
        the backbone's `usual_process`.

        Raises InputError: no backbone, or a backbone that does not do as it says (`dyndit.models.own`).
        """
        super().__init__()
        check_backbone(backbone, process)
        self.backbone = backbone
        self.exits = exits
        self.pixel_space = pixel_space
        """True if pictures are pixels in [-1, 1] (predicted x0 is clamped to it); False for latents."""
        self.process = backbone.usual_process if process is None else process
        """The process: how noise and picture mix, and the quantity that the backbone predicts."""
        self.autoencoder: AutoencoderRecord | None = None
        """The autoencoder that made the latents, if it is known."""
        self.folder: Path | None = None
        """The native folder that the model was loaded from or saved in; its shift table serves `sample(budget=...)`."""
        self._identity: tuple[str, Identity] | None = None

    def __repr__(self) -> str:
        """Describe the model in a line. `print(model.backbone)` shows its modules."""
        backbone, shape = self.backbone, "x".join(map(str, self.backbone.sample_shape))
        exits = f"exits after {', '.join(map(str, self.exits.layers))}" if self.exits is not None else "no exits"
        sizes = f"{self.num_blocks} blocks of width {backbone.width}, {exits}"
        return f"DynamicDepth({type(backbone).__name__}, {sizes}, {self.process.name}, {shape})"

    @property
    def num_blocks(self) -> int:
        """Return L, the full depth."""
        return self.backbone.num_blocks

    @property
    def depths(self) -> tuple[int, ...]:
        """Return every depth that can be run, rising; the last is L."""
        return (*(self.exits.layers if self.exits is not None else ()), self.num_blocks)

    def forward(self, x: Tensor, t: Tensor, y: Condition, depth: int | None = None) -> Tensor:
        """Predict at `depth` blocks (default: all).  x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W).

        Raises InputError if there is no exit at `depth`.
        """
        depth = self.num_blocks if depth is None else depth
        if depth not in self.depths:
            raise InputError(f"depth {depth}: expected one of {list(self.depths)}, where this model has exits")
        return self.branches(x, t, [y], [depth])[0]

    def predict(self, step: StepInputs, memory: Any) -> tuple[list[Tensor], Any]:
        """Run one sampling step: the one function that samplers and the plug-in call.

        memory: None at the first step, later the memory that the step before returned. A model that reuses earlier
        steps in another way overrides this method. It keeps its state in the memory, never in itself.

        -> the predictions, each (B, C_out, H, W), and the memory for the next step. The conditional prediction comes
        first; in a guided step the prediction that guides it follows.
        """
        memory, work, timestep = memory or Memory(), step.work, step.timesteps[step.k]
        recall = self.exits.config.recall if self.exits is not None else ()
        passing, keep = work.heads_beside(recall), [depth for depth in work.kept if depth in recall]
        seen: dict[int, Tensor] = {}
        leave = None
        if work.forecast and work.depths[0] in recall:
            assert memory.left is not None  # `DepthPlan` has seen to it
            leave = partial(self.recalled, left=memory.left, timestep=timestep)
        predictions = self.run(
            step.branches,
            work.depths,
            passing,
            uncond_first=step.uncond_first,
            seen=seen,
            keep=[*keep, self.num_blocks] if keep else (),
            leave=leave,
        )
        num = len(step.branches)
        own, passed = predictions[:num], dict(zip(passing, predictions[num:], strict=True))
        if work.forecast and leave is None:
            gains = None if self.exits is None else self.exits.gains_of(work.depths[0])
            own[0] = own[0] + forecast_gap(memory.gaps, work.depths[0], timestep, self.process, gains)
        if keep:
            memory = replace(memory, left=Left(timestep, seen))
        if gaps := {depth: own[0] - passed[depth] for depth in work.kept if depth not in recall}:
            memory = replace(memory, gaps=remembered(memory.gaps, timestep, gaps))
        if len(own) == 2:
            memory = replace(memory, guided=(own[0], own[1]))
        elif work.own_exit:
            own.append(passed[work.own_exit])
        elif work.held and memory.guided is not None:
            conditional, unconditional = (prediction.float() for prediction in memory.guided)
            own.append(own[0].float() - (conditional - unconditional))
        if len(own) == 2:
            own[1] = work.strengthened(*own)
        return own, memory

    def branches(self, x: Tensor, t: Tensor, labels: Sequence[Condition], depths: Sequence[int]) -> list[Tensor]:
        """Predict the same pictures under several label sets, each at its own depth.

        x: (B, C, H, W), t: (B,), labels: k times (B,), depths: k of `self.depths` -> k times (B, C_out, H, W).
        """
        return self.run([Inputs(x, t, y) for y in labels], depths)

    def run(
        self,
        branches: Sequence[Inputs],
        depths: Sequence[int],
        passing: Sequence[int] = (),
        *,
        uncond_first: bool = False,
        keep: Sequence[int] = (),
        seen: dict[int, Tensor] | None = None,
        leave: Callable[[State, int], Tensor] | None = None,
    ) -> list[Tensor]:
        """Run all branches as one batch. After each exit depth, remove the rows that leave there.

        depths: one of `self.depths` per branch. passing: more exits of the first branch, rising, below its own depth.
        uncond_first: stack equally deep branches in reverse order. seen: is given the first branch's tokens after each
        depth in `keep`, (B, N, D). leave: predicts at the end of a branch (default: `self.leave`).
        -> a prediction per branch, in the order given, then a prediction per exit in `passing`.
        """
        order = sorted(range(len(branches)), key=lambda i: (depths[i], -i if uncond_first else i))
        joined = Inputs.joined([branches[i] for i in order])
        state, done = self.backbone.embed(joined.x, joined.t, joined.y), 0
        predictions: list[Tensor] = [joined.x] * len(branches)
        before_first = sum(len(branches[i]) for i in order[: order.index(0)])
        for depth, group in groupby(order, key=lambda i: depths[i]):
            for index in range(done, depth):
                state = self.backbone.block(index, state)
                if index + 1 in passing:
                    first = state.rows(before_first, before_first + len(branches[0]))
                    predictions.append(self.leave(first, index + 1))
                if seen is not None and index + 1 in keep:
                    seen[index + 1], _ = state.rows(before_first, before_first + len(branches[0])).for_head()
            leaving = list(group)
            sizes = [len(branches[i]) for i in leaving]
            prediction = (leave or self.leave)(state.rows(0, sum(sizes)), depth)
            for branch, rows in zip(leaving, prediction.split(sizes), strict=True):
                predictions[branch] = rows
            state, done = state.rows(sum(sizes), None), depth
            before_first -= sum(sizes)
        return predictions

    def leave(self, state: State, depth: int) -> Tensor:
        """Predict from the state after `depth` blocks -> (B, C_out, H, W)."""
        if depth == self.num_blocks:
            return self.backbone.head(state)
        assert self.exits is not None  # `depths` has no other depth without exits
        return self.backbone.unpatchify(self.exits.patches(state, depth), state)

    def recalled(self, state: State, depth: int, left: Left, timestep: float) -> Tensor:
        """Predict full depth after `depth` blocks from what a full-depth step left -> (B, C_out, H, W)."""
        assert self.exits is not None  # so has the plan's check
        when = basis(timestep, left.timestep, self.process).to(state.tokens.device)
        return self.backbone.unpatchify(self.exits.recalled(state, depth, left, when), state)

    def every_exit(self, x: Tensor, t: Tensor, y: Condition) -> dict[int, Tensor]:
        """Predict at every depth in one pass.  -> {depth: (B, C_out, H, W)}."""
        full, *exits = self.run([Inputs(x, t, y)], [self.num_blocks], self.depths[:-1])
        return dict(zip(self.depths, [*exits, full], strict=True))

    @property
    def identity(self) -> Identity:
        """Return the hashes that exits, plans and tables are bound to. Computed again only after weights change."""
        seen = sketch(self.state_dict()) + self.backbone.unseen_text(self.process)
        if self._identity is None or self._identity[0] != seen:
            with progress_bar("hashing the weights"):
                exits = identity_of(self.exits.state_dict()) if self.exits is not None else ""
                self._identity = (seen, Identity(self.backbone.identity(process=self.process), exits))
        return replace(self._identity[1], autoencoder=self.autoencoder.hash if self.autoencoder else "")

    def check_identity(self, backbone: str, exits: str, *, origin: str, error: type[InputError] = InputError) -> None:
        """Refuse hashes of another backbone or of other exits: see `dyndit.models.identity.check`."""
        if not (backbone or exits):
            return
        exact = None
        if backbone.startswith(VERSION_1) or exits.startswith(VERSION_1):
            of_exits = "" if self.exits is None else tensors_hash(self.exits.state_dict())
            exact = Identity(self.backbone.checksum(process=self.process), of_exits)
        check(self.identity, backbone, exits, origin=origin, exact=exact, error=error)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  diffusers' takes other options
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        license: str | None = None,
        **hub: Any,
    ) -> None:
        """Write a native folder with its model card. With `push_to_hub`, upload it with the plans and table in it.

        repo_id: "org/name" (default: the folder's name). license: for the card. hub: see `push_to_hub`.

        Raises:
            InputError: the backbone belongs to an adapter; its own library saves it.
            CheckpointError: the hub refuses.
        """
        options = {"push_to_hub": push_to_hub, "repo_id": repo_id, "license": license, **hub}
        self._stored().save(self, Path(save_directory), **options)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  diffusers' takes other options
        cls,
        path_or_hub_id: str | Path,
        *,
        num_heads: int | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        trust: str | Sequence[str] = (),
        **of_diffusers: Any,
    ) -> DynamicDepth:
        """Load any path or hub id that `dyndit.load` recognises, in eval mode.

        trust: modules that define a backbone of your own, see `dyndit.load`.
        of_diffusers: options that diffusers passes to each component of a pipeline, for example `variant`; ignored.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or foreign.
            InputError: an option that neither this method nor diffusers knows.
        """
        if unknown := sorted(of_diffusers.keys() - OPTIONS_OF_DIFFUSERS):
            raise InputError(f"from_pretrained: option {unknown[0]}; expected num_heads, revision or torch_dtype")
        model = cls._stored().load(path_or_hub_id, num_heads=num_heads, revision=revision, trust=trust)
        if wanted := dtype or torch_dtype:
            for part in model.children():  # `ModelMixin.to` itself warns of every dtype, even without need
                part.to(wanted)
        return model

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]  diffusers' takes other options
        self, repo_id: str, *, folder: str | Path | None = None, **hub: Any
    ) -> str:
        """Upload the native folder and its model card to the hub -> the address of the commit.

        folder: a native folder of this model; its plans and shift table are uploaded too. hub: private, token,
        revision, commit_message, create_pr, as in `huggingface_hub.HfApi`; license for the card.

        Raises:
            CheckpointError: the folder belongs to another model, or the hub refuses.
        """
        return self._stored().push(self, repo_id, folder=folder, **hub)

    @classmethod
    def _stored(cls) -> Storage:
        if cls.storage is None:
            raise InputError("DynamicDepth: nothing stores it yet; expected `import dyndit.storage.pretrained` before")
        return cls.storage


def compile_parts(model: DynamicDepth, **options: Any) -> None:
    """Compile every block and every exit head by itself, in place. Depths then change without compiling again.

    Blocks of a kind share one code, and so do heads of the same shapes. A guided plan with unequal depths calls it
    with B and with 2B rows. options: passed to `torch.compile`.
    """
    heads = [] if model.exits is None else model.exits.heads.values()
    for module in [*model.backbone.block_modules(), *heads]:
        module.compile(fullgraph=True, **options)
