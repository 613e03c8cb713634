"""Hooks of diffusers on a transformer of the user: added by name, removed without a trace."""

# pyright: reportPrivateUsage=false
# torch and diffusers keep to themselves what is looked at here.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from dyndit.errors import InputError

Target = DiffusionPipeline | nn.Module
"""A pipeline with a transformer, or the transformer itself."""


def transformer_of(target: Target, component: str = "transformer") -> nn.Module:
    """Return the transformer of a pipeline, or the module itself. component: its name, see `dyndit.plugin.experts`.

    Raises:
        InputError: the pipeline has no transformer.
    """
    if not isinstance(target, DiffusionPipeline):
        return target
    transformer = target.components.get(component)
    if transformer is None:  # pipelines can be loaded without it
        name = type(target).__name__
        raise InputError(f"{name}: has no {component}; expected the pipeline of a Diffusion Transformer")
    return transformer


def add_hook(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on the module, outside of its existing hooks.

    Raises:
        InputError: the module has a hook of this name already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(name) is not None:
        raise InputError(f"{type(module).__name__}: has the hook {name} already; expected one at a time")
    registry.register_hook(hook, name)
    registry.invalidate_child_registries_cache()


def remove_hook(module: nn.Module, name: str) -> None:
    """Remove the hook. Without the hook, do nothing."""
    registry: HookRegistry | None = module.__dict__.get("_diffusers_hook")
    if registry is None or registry.get_hook(name) is None:
        return
    outermost = module.__dict__["forward"]
    registry.remove_hook(name, recurse=False)
    registry.invalidate_child_registries_cache()
    if "_old_forward" in module.__dict__ and module.__dict__["forward"] is not outermost:
        # Offloading by accelerate, added later, runs the forward that it found and restores it after a pipeline call.
        whole: Any = module
        whole._old_forward, whole.forward = whole.forward, outermost
    # diffusers leaves an instance attribute and an empty registry behind.
    if module.__dict__.get("forward") == type(module).forward.__get__(module):
        del module.__dict__["forward"]
    if not registry.hooks:
        del module.__dict__["_diffusers_hook"]


@contextmanager
def watching(
    module: nn.Module,
    name: str,
    on_call: Callable[..., None],
    on_return: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Report every call of `module` while open: on_call(*args, **kwargs) before it, on_return() after it.

    Use torch's own hooks: an offloaded pipeline resets the module's forward after each of its calls. Later hooks of
    diffusers are lost with it.

    Raises:
        InputError: a watch of this name is open already.
    """
    watches = module._forward_pre_hooks.values()
    if any(isinstance(watch, _Watch) and watch.name == name for watch in watches):
        raise InputError(f"{type(module).__name__}: has the hook {name} already; expected one at a time")
    before = module.register_forward_pre_hook(_Watch(name, on_call), with_kwargs=True)
    after = module.register_forward_hook(lambda *_: on_return())
    try:
        yield
    finally:
        before.remove()
        after.remove()


@dataclass(frozen=True)
class _Watch:
    """Report a call without changing it."""

    name: str
    on_call: Callable[..., None]

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        self.on_call(*args, **kwargs)
