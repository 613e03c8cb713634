"""DynamicDepth: a backbone, its exits, and the one loop that runs a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

import torch
from diffusers import ModelMixin
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models import Backbone, Condition, Inputs, State, tensors_hash
from dyndit.models.exits import Exits
from dyndit.models.forecasts import forecast_gap, remembered
from dyndit.process import Process


@dataclass(frozen=True)
class Step:
    """What the sampling loop asks of a model at one step.

    k: the step, from 0; x_t: (B, C, H, W), scaled as the network takes it, in the precision of its weights; times: (B,)
    on its device; labels: (B,) per branch, the conditional one first and the unconditional one, where there is
    guidance at this step, second; depths: of `DynamicDepth.depths`, one per branch; timesteps: of the whole sampling,
    on the host, falling. guide: where it is not 0, there is one branch, and a second prediction is asked for: that of
    its own exit at this depth. forecasts: what full depth adds to the conditional branch's exit is to be forecast, and
    added. kept: the exits of a branch at full depth that later steps forecast from.
    """

    k: int
    x_t: Tensor
    times: Tensor
    labels: tuple[Condition, ...]
    depths: tuple[int, ...]
    timesteps: tuple[float, ...]
    guide: int = 0
    forecasts: bool = False
    kept: tuple[int, ...] = ()


_OPTIONS_OF_DIFFUSERS = {
    *("device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage", "disable_mmap"),
    *("variant", "use_safetensors", "use_flashpack", "quantization_config", "cached_folder", "cache_dir", "token"),
    *("provider", "sess_options", "provider_options", "local_files_only", "force_download", "proxies", "subfolder"),
}
"""What `DiffusionPipeline.from_pretrained` passes on to its components, whatever they are."""


class DynamicDepth(ModelMixin):
    """A backbone that may leave early through an exit. Depth L is the original model, bit for bit.

    A `ModelMixin`, so that pipelines of diffusers save and load it among their components; how it is stored is
    `dyndit.storage.load`' native folder.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None = None,
        *,
        pixel_space: bool = True,
        process: Process | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.exits = exits
        self.pixel_space = pixel_space
        """Whether pictures are pixels in [-1, 1] (predicted x0 is clamped there) or latents."""
        self.process = backbone.usual_process if process is None else process
        """How noise and picture mix, and what the backbone predicts of the mixture."""

    @property
    def num_blocks(self) -> int:
        """L, the full depth."""
        return self.backbone.num_blocks

    @property
    def depths(self) -> tuple[int, ...]:
        """Every depth that can be run, rising; the last is L."""
        return (*(self.exits.layers if self.exits is not None else ()), self.num_blocks)

    def forward(self, x: Tensor, t: Tensor, y: Condition, depth: int | None = None) -> Tensor:
        """Predict at `depth` blocks (default: all).  x: (B, C, H, W), t: (B,), y: (B,) -> (B, C_out, H, W).

        Raises:
            InputError: there is no exit at `depth`.
        """
        depth = self.num_blocks if depth is None else depth
        if depth not in self.depths:
            raise InputError(f"depth {depth}: expected one of {list(self.depths)}, where this model has exits")
        return self.branches(x, t, [y], [depth])[0]

    def predict(self, step: Step, memory: object) -> tuple[list[Tensor], object]:
        """What the sampling loop calls: a prediction per branch (B, C_out, H, W), or the branch's own and its guide's,
        and the memory for the next step.

        memory: None at a sampling's start, later what the step before returned. A plan remembers what its forecasts
        need; a model that reuses earlier steps in another way overrides this, and keeps all it needs in the memory,
        never in itself.
        """
        passing = sorted({*step.kept, *((step.guide,) if step.guide else ())})
        branches = [Inputs(step.x_t, step.times, labels) for labels in step.labels]
        predictions = self.run(branches, step.depths, passing)
        own, passed = predictions[: len(branches)], dict(zip(passing, predictions[len(branches) :], strict=True))
        timestep = step.timesteps[step.k]
        if step.forecasts:
            gains = None if self.exits is None else self.exits.gains_of(step.depths[0])
            own[0] = own[0] + forecast_gap(memory, step.depths[0], timestep, self.process, gains)
        if step.kept:
            memory = remembered(memory, timestep, {depth: own[0] - passed[depth] for depth in step.kept})
        return ([*own, passed[step.guide]] if step.guide else own), memory

    def branches(self, x: Tensor, t: Tensor, labels: Sequence[Condition], depths: Sequence[int]) -> list[Tensor]:
        """Predict the same pictures under several label sets, each at its own depth.

        x: (B, C, H, W), t: (B,), labels: k times (B,), depths: k of `self.depths` -> k times (B, C_out, H, W).
        """
        return self.run([Inputs(x, t, y) for y in labels], depths)

    def run(self, branches: Sequence[Inputs], depths: Sequence[int], passing: Sequence[int] = ()) -> list[Tensor]:
        """Predict every branch at its own depth: one batch as deep as all go; those that leave are cut off.

        depths: one of `self.depths` per branch -> a prediction per branch, in the order given, and after them those of
        the first branch's exits at the depths `passing`, rising and below its own.
        """
        order = sorted(range(len(branches)), key=lambda i: depths[i])
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
            leaving = list(group)
            sizes = [len(branches[i]) for i in leaving]
            prediction = self.leave(state.rows(0, sum(sizes)), depth)
            for branch, rows in zip(leaving, prediction.split(sizes), strict=True):
                predictions[branch] = rows
            state, done = state.rows(sum(sizes), None), depth
            before_first -= sum(sizes)
        return predictions

    def leave(self, state: State, depth: int) -> Tensor:
        """The prediction from the state after `depth` blocks -> (B, C_out, H, W)."""
        if depth == self.num_blocks:
            return self.backbone.head(state)
        return self.backbone.unpatchify(self.exits.patches(state, depth), state)

    def along(self, x: Tensor, t: Tensor, y: Condition, depths: Sequence[int]) -> list[Tensor]:
        """The predictions at rising depths, in one pass.  -> (B, C_out, H, W) for each."""
        state, done, predictions = self.backbone.embed(x, t, y), 0, []
        for depth in depths:
            for index in range(done, depth):
                state = self.backbone.block(index, state)
            predictions.append(self.leave(state, depth))
            done = depth
        return predictions

    def every_exit(self, x: Tensor, t: Tensor, y: Condition) -> dict[int, Tensor]:
        """The prediction at every depth, in one pass.  -> {depth: (B, C_out, H, W)}."""
        return dict(zip(self.depths, self.along(x, t, y, self.depths), strict=True))

    def trunk_hash(self) -> str:
        """Hash of the trunk and its process; exits, plans and tables are bound to it."""
        return self.backbone.identity(process=self.process)

    def exits_hash(self) -> str:
        """Hash of the exits' weights ("" without exits)."""
        return tensors_hash(self.exits.state_dict()) if self.exits is not None else ""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        license: str | None = None,
        **hub: object,
    ) -> None:
        """Write a native folder with its model card; `push_to_hub` uploads it, with the plans and table lying there.

        repo_id: "org/name" (default: the folder's name). license: for the card. hub: as in `push_to_hub`.

        Raises:
            InputError: the trunk is an adapter's: its own library saves it.
            CheckpointError: the hub refuses.
        """
        from dyndit.storage import card as model_card
        from dyndit.storage import load as checkpoints

        folder = Path(save_directory)
        checkpoints.save(self, folder)
        model_card.write(self, folder, license=license)
        if push_to_hub:
            checkpoints.push(folder, repo_id or folder.name, **hub)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        num_heads: int | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **of_diffusers: object,
    ) -> Self:
        """Load whatever `dyndit.load` recognises, in eval mode.

        of_diffusers: what it passes to each component of a pipeline about its own file formats (`variant`,
        `low_cpu_mem_usage`, ...); means nothing here.

        Raises:
            CheckpointError: missing, damaged or foreign.
            InputError: an option that is neither ours nor diffusers'.
        """
        from dyndit.storage import load as checkpoints

        if unknown := sorted(of_diffusers.keys() - _OPTIONS_OF_DIFFUSERS):
            raise InputError(f"from_pretrained: option {unknown[0]}; expected num_heads, revision or torch_dtype")
        model = checkpoints.load(path_or_hub_id, num_heads=num_heads, revision=revision)
        if wanted := dtype or torch_dtype:
            for part in model.children():  # `ModelMixin.to` warns of any dtype, whether it matters or not
                part.to(wanted)
        return model

    def push_to_hub(self, repo_id: str, *, folder: str | Path | None = None, **hub: object) -> str:
        """Upload the native folder and its model card to the hub -> the address of the commit.

        folder: a native folder of this very model, whose plans and shift table go along. hub: private, token,
        revision, commit_message, create_pr, as in `huggingface_hub.HfApi`; license for the card.

        Raises:
            CheckpointError: the folder is of another model, or the hub refuses.
        """
        from dyndit.storage import load as checkpoints

        return checkpoints.push_model(self, repo_id, folder=folder, **hub)
