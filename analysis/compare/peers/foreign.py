"""Run caches of other libraries on diffusers' version of the same weights (`to_diffusers`).

Both branches go through the transformer in one call, the conditional rows first, as in `DiTPipeline`. Diffusers embeds
timestep and class once per block, our model only once. So compare these peers' times with `diffusers-full` too.

These libraries keep state inside the modules. After every step the peer takes the state out as the sampling's memory,
and puts it back before the next step. Nothing leaks between samplings, and forks are copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models import CacheMixin
from torch import Tensor, nn

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan
from dyndit.storage.diffusers_folder import to_diffusers

NOT_APPLICABLE = {
    "sea_cache": "SeaCache (arXiv:2602.18993) decides on flow-matching latents (C, T, H, W), and diffusers reads them "
    "off Cosmos and Wan alone: on a DiT every block runs",
    "text_kv_cache": "the text cache keeps keys and values of a prompt, which a class-conditional DiT has not: it "
    "finds no block to hook",
}
"""Caches of diffusers that cannot be peers here, with the reason; the tests prove it."""


@dataclass(frozen=True)
class Memory:
    """The number of branches that a step ran, and the state that it left in each holder, in the peer's order."""

    branches: int
    states: tuple[object, ...]


class TransformerPeer(Peer):
    """A peer that calls diffusers' transformer as a whole. Subclasses read and write the library's state."""

    uncond_first: ClassVar[bool] = False
    """True if the library expects the unconditional rows first."""

    def __init__(self, model: DynamicDepth, settings: PeerSettings) -> None:
        super().__init__(model, settings)
        self.transformer = to_diffusers(model)

    def predict(self, step: StepInputs, memory: object) -> tuple[list[Tensor], object]:
        """See `DynamicDepth`. Raises InputError: guidance begins or stops on the way; the cache holds other rows."""
        count = len(step.labels)
        if memory is not None and memory.branches != count:
            found = f"{count} branches at step {step.k}, {memory.branches} before"
            raise InputError(f"peer {self.settings.name}: {found}; expected the same at every step")
        self.ready(step)
        self.put(None if memory is None else memory.states)
        order = range(count)[::-1] if self.uncond_first else range(count)
        x, t = (torch.cat([part] * count) for part in (step.x_t, step.times))
        predictions = self.call(x, t, torch.cat([step.labels[i] for i in order])).chunk(count)
        return [predictions[i] for i in order], Memory(count, self.take())

    def call(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Call the transformer.  x: (N, C, H, W), t, y: (N,) -> (N, C_out, H, W)."""
        return self.transformer(hidden_states=x, timestep=t, class_labels=y, return_dict=False)[0]

    def ready(self, step: StepInputs) -> None:
        """Prepare the cache for a step, before it runs; by default do nothing."""

    def put(self, states: Sequence[object] | None) -> None:
        """Put a sampling's state into the modules; None: a sampling begins."""
        raise NotImplementedError

    def take(self) -> tuple[object, ...]:
        """Return the state that the modules hold."""
        raise NotImplementedError


class DiffusersPeer(TransformerPeer):
    """A peer that runs one of diffusers' caches. Its hooks keep state in a `StateManager` or an attribute `state`."""

    def __init__(self, model: DynamicDepth, settings: "DiffusersCache") -> None:
        super().__init__(model, settings)
        self._timestep = 0.0
        settings.attach(self.transformer, lambda: self._timestep)
        self.find_states()

    def ready(self, step: StepInputs) -> None:
        """Tell the cache the timestep."""
        self._timestep = step.timesteps[step.k]

    def find_states(self) -> None:
        """Find the holders of the hooks' state. Call this after adding hooks."""
        root = HookRegistry.check_if_exists_or_initialize(self.transformer)
        root.invalidate_child_registries_cache()
        registries = [vars(module).get("_diffusers_hook") for module in self.transformer.modules()]
        hooks: list[ModelHook] = [h for r in registries if r is not None for h in r.hooks.values()]
        held = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        self._managers = list(dict.fromkeys(held))
        self._stated = [hook for hook in hooks if "state" in vars(hook)]

    def call(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Call the transformer in a cache context. Its class lacks `CacheMixin`, so call the method unbound."""
        with CacheMixin.cache_context(self.transformer, "both"):
            return super().call(x, t, y)

    def put(self, states: Sequence[object] | None) -> None:
        """Set the states; make new ones for a new sampling. `reset_stateful_hooks` would empty a running sampling's."""
        fresh = [{} for _ in self._managers] + [type(hook.state)() for hook in self._stated]
        states = fresh if states is None else states
        for manager, state in zip(self._managers, states, strict=False):
            manager._state_cache = state
        for hook, state in zip(self._stated, states[len(self._managers) :], strict=True):
            hook.state = state

    def take(self) -> tuple[object, ...]:
        """Return a dictionary per manager, then the state of each other hook."""
        return (*(manager._state_cache for manager in self._managers), *(hook.state for hook in self._stated))


@dataclass(frozen=True)
class DiffusersCache(PeerSettings):
    """Settings of one of diffusers' caches."""

    runs: ClassVar[type[DiffusersPeer]] = DiffusersPeer
    compared: ClassVar = ((),)
    """By default the settings as they are."""

    def attach(self, transformer: nn.Module, timestep: Callable[[], float]) -> None:
        """Hook the cache into the transformer, if it has one.  timestep: returns the current timestep."""

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """Make the peer on `model`, with its own transformer. Raises InputError: diffusers has no such model."""
        return self.runs(model, self)

    def share_of_blocks(self, plan: DepthPlan) -> float | None:
        """Return None: blocks run in part, or the data decide."""
        return None
