"""Look at the contents of all pictures once: hash them, and find the damaged ones before a run begins.

What was found is kept by the size, times and inode of each file, so the next look reads changed files only.
Records lie in `cache_folder`. A damaged record is ignored.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dyndit.errors import InputError
from dyndit.files import append_lines, read_lines, write_text
from dyndit.pictures.decode import decode, has_frames
from dyndit.pictures.sources import Source
from dyndit.progress import progress_bar

DAMAGED, FRAMES = "damaged pictures", "later frames of pictures with several"
KEPT_EVERY = 2000


class Checked(NamedTuple):
    """One picture's contents.  sha256: of its file. problem: "" if it decodes. frames: it holds several."""

    sha256: str
    problem: str
    frames: bool


def cache_folder() -> Path:
    """Return `$DYNDIT_CACHE`, else `$XDG_CACHE_HOME/dyndit`, else `~/.cache/dyndit`: for features and records."""
    if chosen := os.environ.get("DYNDIT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dyndit"


def check_contents(source: Source) -> list[Checked]:
    """Hash and decode every picture of a source that has changed since the last check; return all, in order."""
    record = cache_folder() / "checked" / f"{_digest(str(Path(source.root).resolve()).encode())[:32]}.jsonl"
    stamps = [source.stamp(number) for number in range(len(source.names))]
    known = _read(record)
    keys = [(str(name), stamp) for name, stamp in zip(source.names, stamps, strict=True)]
    todo = [number for number, key in enumerate(keys) if key not in known]
    with progress_bar("checking pictures", unit="pictures") as advance:
        advance(len(keys) - len(todo), len(keys))
        lines: list[str] = []
        for done, (number, found) in enumerate(zip(todo, _examined(source, todo), strict=True), 1):
            known[keys[number]] = found
            lines.append(_line(keys[number], found))
            if done % KEPT_EVERY == 0:
                _keep(append_lines, record, lines)
                lines = []
            advance(len(keys) - len(todo) + done, len(keys))
    result = [known[key] for key in keys]
    if todo:
        _keep(write_text, record, list(map(_line, keys, result)))
    return result


def refuse_damaged(source: Source, found: Iterable[Checked]) -> None:
    """Raise InputError if a picture is damaged; it names the first and counts all."""
    problems = [one.problem for one in found if one.problem]
    if problems:
        more = f" ({len(problems)} of {len(source.names)} pictures are damaged)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; --skip-damaged leaves damaged pictures out")


def _examined(source: Source, numbers: list[int]) -> Iterator[Checked]:
    if len(numbers) == len(source.names) and isinstance(source.names, range):  # arrays: in order is fastest
        yield from map(_look, source.in_order(), map(source.name, numbers))
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the interpreter's lock
        for low in range(0, len(numbers), 256):  # few at a time: a pool would read ahead without end
            yield from pool.map(lambda number: _examine(source, number), numbers[low : low + 256])


def _examine(source: Source, number: int) -> Checked:
    try:
        contents = source.contents(number)
    except InputError as error:
        return Checked("", str(error), False)
    return _look(contents, source.name(number))


def _look(contents: bytes | np.ndarray, name: str) -> Checked:
    if not isinstance(contents, bytes):
        levels = np.ascontiguousarray(contents)
        return Checked(_digest(f"{levels.shape} ".encode() + levels.tobytes()), "", False)
    digest = _digest(contents)
    try:
        decode(contents, name)
        return Checked(digest, "", has_frames(contents))
    except InputError as error:
        return Checked(digest, str(error), False)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _line(key: tuple[str, tuple[int, ...]], found: Checked) -> str:
    text = json.dumps([*key, *found])
    return f"{_digest(text.encode())[:16]} {text}\n"


def _read(record: Path) -> dict[tuple[str, tuple[int, ...]], Checked]:
    known = {}
    try:
        lines = read_lines(record).splitlines()
    except InputError:
        return {}
    for line in lines:
        digest, _, text = line.partition(" ")
        if digest == _digest(text.encode())[:16]:
            name, stamp, *found = json.loads(text)
            known[name, tuple(stamp)] = Checked(*found)
    return known


def _keep(write: Callable[[Path, str], None], record: Path, lines: list[str]) -> None:
    """Write lines to a record. On a full or read-only disk nothing is kept, and nothing is raised."""
    try:
        write(record, "".join(lines))
    except InputError as error:
        logging.getLogger(__name__).warning("checks not kept: %s", error)
