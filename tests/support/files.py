"""What tests of files share."""

from pathlib import Path

import pytest
import torch

from dyndit.errors import CheckpointError, InputError
from dyndit.storage import load as checkpoints


def refused(path: Path, kind: type[InputError] = CheckpointError, **options: object) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(kind) as caught:
        checkpoints.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 500
    return message


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Canary:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))
