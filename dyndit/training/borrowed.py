"""Borrow a backbone: frozen while in use, given back as it came."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from dyndit.errors import InputError


@contextmanager
def borrowed(trunk: nn.Module) -> Iterator[None]:
    """Freeze a trunk, in eval mode; give it back with the flags, the modes and on the device that it came with.

    Raises:
        InputError: it lies on several devices.
    """
    devices = {tensor.device for tensor in (*trunk.parameters(), *trunk.buffers())}
    if len(devices) > 1:
        raise InputError(f"trunk: lies on {', '.join(sorted(map(str, devices)))}; expected one device")
    flags = {parameter: parameter.requires_grad for parameter in trunk.parameters()}
    modes = {module: module.training for module in trunk.modules()}
    trunk.eval().requires_grad_(False)
    try:
        yield
    finally:
        trunk.to(*devices)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def precision_of(trunk: nn.Module) -> AbstractContextManager:
    """Autocast to a trunk's precision, where that is half."""
    parameter = next(trunk.parameters())
    halved = parameter.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(parameter.device.type, parameter.dtype) if halved else nullcontext()
