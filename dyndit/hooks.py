"""Hooks of diffusers on a transformer that somebody else owns: put on by name, taken off without a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from dyndit.errors import InputError

Target = DiffusionPipeline | nn.Module
"""A pipeline with a transformer, or the transformer."""


def transformer_of(target: Target) -> nn.Module:
    """The transformer of a pipeline, or the module itself.

    Raises:
        InputError: the pipeline has none.
    """
    if not isinstance(target, DiffusionPipeline):
        return target
    if "transformer" not in target.components:
        name = type(target).__name__
        raise InputError(f"{name}: has no transformer; expected the pipeline of a Diffusion Transformer")
    return target.components["transformer"]


def add_hook(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on the module itself, outside of the hooks that are there.

    Raises:
        InputError: a hook of this name is there.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(name) is not None:
        raise InputError(f"{type(module).__name__}: has the hook {name} already; expected one at a time")
    registry.register_hook(hook, name)
    registry.invalidate_child_registries_cache()


def remove_hook(module: nn.Module, name: str) -> None:
    """Take the hook off again. Nothing happens where there is none."""
    registry: HookRegistry | None = module.__dict__.get("_diffusers_hook")
    if registry is None or registry.get_hook(name) is None:
        return
    registry.remove_hook(name, recurse=False)
    registry.invalidate_child_registries_cache()
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
    """Tell of every call of `module` while open: on_call(*args, **kwargs) before it, on_return() after it."""
    add_hook(module, _Watch(on_call, on_return), name)
    try:
        yield
    finally:
        remove_hook(module, name)


class _Watch(ModelHook):
    """Changes nothing about a call."""

    def __init__(self, on_call: Callable[..., None], on_return: Callable[[], None]) -> None:
        super().__init__()
        self.on_call, self.on_return = on_call, on_return

    def pre_forward(
        self, module: nn.Module, *args: object, **kwargs: object
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """As passed."""
        self.on_call(*args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: object) -> object:
        """As returned."""
        self.on_return()
        return output
