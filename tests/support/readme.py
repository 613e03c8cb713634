"""The README's Python examples, and the network that its third example wraps."""

import re

from support.fences import ROOT

TITLES = ("A checkpoint of the published code.", "A pipeline of diffusers.", "Your own model.")

NET = '''"""Somebody's transformer on pixels: 16 patches of 8 x 8."""

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        return tokens + torch.tanh(self.linear(tokens + tokens.mean(1, keepdim=True) + cond[:, None]))


class Final(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3 * 8 * 8)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        return self.linear(tokens * (1 + cond[:, None]))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.labels = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Mixer(width) for _ in range(8))
        self.final = Final(width)

    def tokens(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return self.labels(y) + torch.sin(t[:, None] / 100 * torch.arange(self.width))

    def pixels(self, patches: Tensor) -> Tensor:
        return nn.functional.fold(patches.transpose(1, 2), 32, 8, stride=8)
'''


def example(title: str, changes: dict[str, str] | None = None) -> str:
    """The Python block under a bold title, shortened; every change has to find what it changes."""
    text = (ROOT / "README.md").read_text()
    block = re.search(rf"\*\*{re.escape(title)}\*\*.*?```python\n(.*?)```", text, re.S)
    assert block is not None, f"README: no example under {title!r}"
    code = block[1]
    for old, new in (changes or {}).items():
        assert old in code, f"README: {title!r} does not say {old!r}"
        code = code.replace(old, new)
    return code
