"""Damage files, and see whether their readers notice."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from dyndit.errors import InputError

FULL = os.environ.get("DYNDIT_TORTURE") == "full"
"""Whether tests make every case that there is, for hours: `make torture`."""


def flips(content: bytes, num: int, seed: int) -> Iterator[bytes]:
    """Yield the content with one bit flipped. Half of the flips are in the first 2,000 bytes, where headers stand."""
    rng = random.Random(seed)
    for k in range(num):
        end = min(2000, len(content)) if k % 2 else len(content)
        damaged = bytearray(content)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        yield bytes(damaged)


def cuts(content: bytes, num: int, seed: int) -> Iterator[bytes]:
    """Yield the content cut off, a few times within its last bytes."""
    rng = random.Random(seed)
    for k in range(num):
        yield content[: max(0, len(content) - k - 1) if k < num // 5 else rng.randrange(len(content))]


def edits(data: object) -> Iterator[object]:
    """Yield JSON with one field changed, removed or added, at every depth."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield {key: kept for key, kept in data.items() if key != name}
            for changed in edits(value):
                yield data | {name: changed}
        yield data | {"an added field": 1}
    elif isinstance(data, list):
        yield [*data, *(data[:1] or [0])]
        for k, value in enumerate(data[:3]):
            for changed in edits(value):
                yield [*data[:k], changed, *data[k + 1 :]]
    elif isinstance(data, bool):
        yield not data
    elif isinstance(data, int | float):
        yield data + 1
        yield str(data)
    elif isinstance(data, str):
        yield data + "x"
        yield None
    else:
        yield 1


def unnoticed(path: Path, damaged: Iterator[bytes], read: Callable[[], object]) -> list[str]:
    """Read a file once for each damage -> a line for each damage that changed what is read without an error.

    read: what the reader makes of the file, or the name of the error. An `InputError` counts as noticed; any other
    error is raised.
    """
    whole, bad = path.read_bytes(), []
    expected = read()
    try:
        for k, content in enumerate(damaged):
            if content == whole:
                continue
            path.write_bytes(content)
            try:
                found = read()
            except InputError as error:
                if "\n" in str(error):
                    bad.append(f"{path.name}, damage {k}: an error of several lines")
                continue
            if found != expected:
                bad.append(f"{path.name}, damage {k}: {str(found)[:80]}")
    finally:
        path.write_bytes(whole)
    return bad


def edited(path: Path) -> Iterator[bytes]:
    """Yield the JSON file with one field edited."""
    for data in edits(json.loads(path.read_text())):
        yield json.dumps(data).encode()
