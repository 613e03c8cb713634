"""Caches of other libraries, on diffusers' version of the very weights (`to_diffusers`): what all of them share.

Both branches go through the transformer in one call, the conditional rows first, as `DiTPipeline` has it. It embeds the
timestep and the class once per block, where ours does so once: `diffusers-full` is the arm that these peers' times are
to be read against, beside full depth.

These libraries keep what a step leaves for the next inside the modules. It is taken out after every step, handed on as
the sampling's memory, and put back before the next: nothing leaks between samplings, and forks are copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models import CacheMixin
from torch import Tensor

from dyndit.analysis.compare.peers.base import Peer, PeerSettings
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan
from dyndit.storage.diffusers_folder import to_diffusers

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

    from dyndit.analysis.compare.peers.base import PeerContext

NOT_APPLICABLE = {
    "sea_cache": "SeaCache (arXiv:2602.18993) decides on flow-matching latents (C, T, H, W), and diffusers reads them "
    "off Cosmos and Wan alone: on a DiT every block runs",
    "text_kv_cache": "the text cache keeps keys and values of a prompt, which a class-conditional DiT has not: it "
    "finds no block to hook",
}
"""Caches of diffusers that are no peers here, and why; the tests show it."""


@dataclass(frozen=True)
class Memory:
    """What a step left inside the modules.

    branches: that the step ran; states: of every holder that the peer knows, in its order.
    """

    branches: int
    states: tuple[object, ...]


class TransformerPeer(Peer):
    """A peer that calls diffusers' transformer as a whole; subclasses say where its code keeps its state."""

    uncond_first: ClassVar[bool] = False
    """Whether the library wants the unconditional rows first."""

    def __init__(self, model: DynamicDepth, settings: PeerSettings) -> None:
        super().__init__(model, settings)
        self.transformer: DiTTransformer2DModel = to_diffusers(model)

    def predict(self, step: StepInputs, memory: object) -> tuple[list[Tensor], object]:
        """See `DynamicDepth.predict`.

        Raises:
            InputError: guidance begins or stops within the sampling: what was cached is of other rows.
        """
        count = len(step.labels)
        if memory is not None and memory.branches != count:
            raise InputError(
                f"peer {self.settings.name}: {count} branches at step {step.k}, {memory.branches} before; "
                "expected the same at every step"
            )
        self.ready(step)
        self.put(None if memory is None else memory.states)
        order = range(count)[::-1] if self.uncond_first else range(count)
        rows = self.call(
            torch.cat([step.x_t] * count),
            torch.cat([step.times] * count),
            torch.cat([step.labels[i] for i in order]),
        )
        predictions = rows.chunk(count)
        return [predictions[i] for i in order], Memory(count, self.take())

    def call(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x: (N, C, H, W), t, y: (N,) -> (N, C_out, H, W)."""
        return self.transformer(hidden_states=x, timestep=t, class_labels=y, return_dict=False)[0]

    def ready(self, step: StepInputs) -> None:
        """Attach what depends on the sampling, before a step of it; by default nothing does."""

    def put(self, states: Sequence[object] | None) -> None:
        """Put the state of a sampling into the modules; None is that of one which begins."""
        raise NotImplementedError

    def take(self) -> tuple[object, ...]:
        """The state that the modules hold."""
        raise NotImplementedError


class DiffusersPeer(TransformerPeer):
    """One of diffusers' caches, whose hooks keep their state in `StateManager`s or an attribute `state`."""

    def __init__(self, model: DynamicDepth, settings: "DiffusersCache") -> None:
        super().__init__(model, settings)
        settings.attach(self.transformer)
        self.find_states()

    def find_states(self) -> None:
        """Find where the hooks keep their states; to be called whenever hooks were added."""
        root = HookRegistry.check_if_exists_or_initialize(self.transformer)
        root.invalidate_child_registries_cache()
        registries = [vars(module).get("_diffusers_hook") for module in self.transformer.modules()]
        self._hooks: list[ModelHook] = [h for r in registries if r is not None for h in r.hooks.values()]
        held = [value for hook in self._hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        self._managers: list[StateManager] = list({id(manager): manager for manager in held}.values())
        self._stated: list[ModelHook] = [hook for hook in self._hooks if "state" in vars(hook)]

    def call(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The transformer in a cache context, which its class has no method for: it lacks `CacheMixin`."""
        with CacheMixin.cache_context(self.transformer, "both"):
            return super().call(x, t, y)

    def put(self, states: Sequence[object] | None) -> None:
        """New containers where a sampling begins: `reset_stateful_hooks` would empty those of one that goes on."""
        fresh = [{} for _ in self._managers] + [type(hook.state)() for hook in self._stated]
        states = fresh if states is None else states
        for manager, state in zip(self._managers, states, strict=False):
            manager._state_cache = state
        for hook, state in zip(self._stated, states[len(self._managers) :], strict=True):
            hook.state = state

    def take(self) -> tuple[object, ...]:
        """A dictionary per manager, then the state of each other hook."""
        return (*(manager._state_cache for manager in self._managers), *(hook.state for hook in self._stated))


@dataclass(frozen=True)
class DiffusersCache(PeerSettings):
    """Settings of one of diffusers' caches."""

    runs: ClassVar[type[DiffusersPeer]] = DiffusersPeer

    @classmethod
    def chosen(cls) -> tuple[Self, ...]:
        """Settings that spread over what the peer can save on the digits at 10 DDIM steps."""
        return (cls(),)

    def attach(self, transformer: "DiTTransformer2DModel") -> None:
        """Hook the cache into the transformer."""

    def model(self, model: DynamicDepth, context: "PeerContext | None" = None) -> DynamicDepth:
        """The peer over `model`, with a transformer of its own.

        Raises:
            InputError: diffusers' class cannot express the model.
        """
        return self.runs(model, self)

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """None: blocks run in part, or as the data decide."""
        return None
