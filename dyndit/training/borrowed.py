"""Borrow a backbone: freeze it while in use, then restore it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dyndit.errors import InputError


@contextmanager
def borrowed(backbone: nn.Module) -> Iterator[None]:
    """Freeze a backbone, in eval mode. Afterwards restore its flags, its modes and its device.

    Raises InputError: the backbone lies on several devices.
    """
    devices = {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())}
    if len(devices) > 1:
        raise InputError(f"backbone: lies on {', '.join(sorted(map(str, devices)))}; expected one device")
    flags = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
    with modes_kept(backbone):
        backbone.eval().requires_grad_(False)
        try:
            yield
        finally:
            for device in devices:
                backbone.to(device)
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Restore the modes of a module and of its parts: training or eval."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def precision_of(backbone: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to a backbone's precision if it is half precision."""
    parameter = next(backbone.parameters())
    halved = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(parameter.device.type, parameter.dtype) if halved else nullcontext()
