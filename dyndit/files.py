"""Write files whole or not at all, read them within bounds, and hash them.

Every writer below works in a draft, a hidden folder beside the target: `.writing-HOST-PID-NUMBER/NAME`. The draft is
flushed to the disk and renamed over the target, and then the target's folder is flushed. A kill or a power cut at any
moment leaves the old file or the new one. It may also leave the draft, which `sweep` removes.

`reached` is called before each change of the disk. Tests replace it, to crash there or to have the disk full there.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.locks import LOCK

DRAFT = ".writing-"
MOST_JSON = 64 << 20
"""Most bytes of a JSON file. A larger file is refused unread."""

_numbers = itertools.count()


def reached(act: str, path: Path) -> None:
    """Do nothing.  act: the change of `path` that comes next: make, write, flush, rename, append or remove."""


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_draft(path: Path) -> bool:
    """Tell if a path is an unfinished draft, or lies in a draft."""
    return any(part.startswith(DRAFT) for part in path.parts)


def sweep(folder: Path, *, ours: bool = True) -> None:
    """Remove the drafts in a folder and below whose writers are dead. Drafts of other machines stay.

    ours: False for a folder that is no run's. Only drafts that lie in it itself are then removed.
    """
    for parent, folders, names in os.walk(folder):
        for name in (name for name in (*folders, *names) if name.startswith(DRAFT)):
            named = re.fullmatch(rf"{re.escape(DRAFT)}([0-9a-f]{{8}})-(\d+)-\d+", name)
            if ours if named is None else named[1] == _host() and not _is_alive(int(named[2])):
                remove(Path(parent, name))
        folders[:] = [name for name in folders if ours and not name.startswith(DRAFT)]


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # on Windows signal 0 kills
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it exists and can be removed."""
    if not (path.exists() or path.is_symlink()):
        return
    reached("remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def written_whole(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a path to write a file or a folder at. If the block succeeds, it becomes `target`; else it is removed.

    The path has the target's name, and so its suffix. Nothing exists there yet. A file, also one in a folder, gets the
    mode that the umask gives a new file, whatever mode its writer chose. A folder can replace only an empty folder.

    Raises InputError: the target cannot be written, for example on a full disk; or it is of another kind.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() if folder else target.is_file()):
        kind = "folder" if folder else "file"
        raise InputError(f"{target}: is no {kind}; expected a {kind} to replace, or nothing")
    with written_together(target.parent, target) as draft:
        reached("write", draft / target.name)
        yield draft / target.name


@contextmanager
def written_together(folder: Path, about: Path | None = None) -> Iterator[Path]:
    """Yield a folder to write files in. If the block succeeds, each file moves whole into `folder`.

    about: path that error messages name in place of `folder`. Raises InputError as `written_whole`.
    """
    draft = folder / f"{DRAFT}{_host()}-{os.getpid()}-{next(_numbers)}"
    try:
        reached("make", draft)
        folder.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        mode = draft.stat().st_mode & 0o666  # the umask, as mkdir applied it
        for path in (written := [*draft.rglob("*")]):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
        made = sorted(draft.iterdir())
        sync(*written)
        for path in made:
            reached("rename", folder / path.name)
            path.replace(folder / path.name)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise _not_written(about or folder, error) from error
    finally:
        remove(draft)


def _not_written(target: Path, error: Exception) -> InputError:
    about = getattr(error, "filename", None)
    other = "" if about is None or is_draft(Path(about)) or Path(about) == target else f" of {about}"
    found = f"{getattr(error, 'strerror', None) or first_line(error)}{other}"
    final = Path(*(part for part in target.parts if not part.startswith(DRAFT)))  # target may lie in a draft folder
    return InputError(f"{final}: cannot be written ({found}); expected a place to write to, with room for it")


def sync(*paths: Path) -> None:
    """Flush files and folders to the disk: a rename alone does not promise that their content is there."""
    for path in paths:
        if path.is_symlink() or (os.name != "posix" and path.is_dir()):  # Windows cannot open folders
            continue
        reached("flush", path)
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        except OSError as error:  # some network file systems cannot flush folders
            if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder in its place, over `target` if this exists. Raises InputError if it cannot be done."""
    try:
        if target.is_dir():
            remove(target)
        reached("rename", target)
        source.replace(target)
        sync(target.parent)
    except OSError as error:
        raise _not_written(target, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text. Line ends are not translated."""
    with written_whole(path) as draft:
        draft.write_bytes(text.encode())


def write_json(path: Path, data: object) -> None:
    """Write data as JSON, see `to_json`."""
    write_text(path, to_json(path, data))


def to_json(path: Path, data: object) -> str:
    """Convert data to the text of a JSON file. Types that JSON lacks become text.  path: for messages.

    Raises:
        InputError: a number is not finite, and JSON cannot hold it.
        ValueError: the data contains itself.
    """
    try:
        return json.dumps(data, indent=1, default=str, allow_nan=False) + "\n"
    except ValueError:
        if odd := next(_not_finite(json.loads(json.dumps(data, default=str))), None):
            raise InputError(f"{path}: {odd[0]} is {odd[1]}; expected a finite number") from None
        raise


def _not_finite(data: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers that are not finite, with their names: ("plan.budget", nan)."""
    if isinstance(data, float) and not math.isfinite(data):
        yield name, data
    elif isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata. The same content makes the same bytes: metadata is sorted by name."""
    with written_whole(path) as draft:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            draft,
            None if metadata is None else dict(metadata),
        )
        if metadata:
            _sort_metadata(draft)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file: the library writes it in a random order.

    The file begins with the header's length, 8 bytes, and the header, JSON padded with spaces.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) != size:  # the library writes no blanks, and escapes as Python does
            raise ValueError(f"{path}: a header of {len(text)} bytes, expected {size}")
        file.seek(8)
        file.write(text)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name. The path ends in .npz."""
    with written_whole(path) as draft:
        np.savez(draft, **dict[str, Any](arrays))


def copy(source: Path, target: Path) -> None:
    """Copy a file's content."""
    with written_whole(target) as draft:
        shutil.copyfile(source, draft)


def append_lines(path: Path, lines: str) -> None:
    """Add whole lines to a text file. Make the file if it is missing.

    After a kill the file holds its old lines, and perhaps some of the new lines. The last line may be torn:
    `read_lines` skips it, and the next call cuts it off. Raises InputError: the file cannot be written.
    """
    path = Path(path)
    try:
        reached("append", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("x+b" if is_new else "r+b") as file:
            file.truncate(_end_of_lines(file))
            file.seek(0, os.SEEK_END)
            file.write(lines.encode())
        sync(path)
        if is_new:
            sync(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error


def _end_of_lines(file: BinaryIO, block: int = 1 << 16) -> int:
    """Return the offset at which the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - block)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def read_lines(path: Path) -> str:
    """Read the whole lines of a text file. Skip a torn last line, in which a power cut may leave zeros.

    Raises CheckpointError: the file is missing, or is no text.
    """
    try:
        data = _read(path).partition(b"\0")[0]
        return data[: data.rfind(b"\n") + 1].decode()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)})") from error


def read_json(path: Path, kind: type[InputError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object.

    Raises CheckpointError, or `kind` if given: missing, over `MOST_JSON` bytes, no JSON, nested too deep, or no object.
    """
    try:
        data = json.loads(_read(path, MOST_JSON).decode(), parse_constant=_refuse_constant)
    except OSError as error:
        raise kind(f"{path}: cannot be read ({_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise kind(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _read(path: Path, most: int | None = None) -> bytes:
    """Read a file's bytes. Raises OSError, also if the file has more than `most` bytes."""
    with opened(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB")
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes. Raises OSError also for files that never end, such as a FIFO."""
    if not stat.S_ISREG(os.stat(path).st_mode) and not Path(path).is_dir():  # noqa: PTH116 - opening a folder fails below
        raise OSError(errno.EINVAL, "no regular file")
    with Path(path).open("rb") as file:
        yield file


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata. Raises CheckpointError if the file is missing, or no safetensors file."""
    try:
        with opened(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        refuse_pointer(path, error)
        raise CheckpointError(f"{path}: no readable safetensors file ({first_line(error)})") from error


def refuse_pointer(path: Path, cause: Exception | None = None) -> None:
    """Raise CheckpointError if the file is a pointer of Git LFS: a clone without LFS leaves it in a file's place."""
    try:
        with opened(path) as file:
            text = file.read(1024)
    except OSError:
        return
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"^size (\d{1,15})$", text, re.MULTILINE)
        found = f"a Git LFS pointer to {int(size[1]):,} bytes" if size else "a Git LFS pointer"
        raise CheckpointError(f"{path}: {found}, not the weights; expected the file after `git lfs pull`") from cause


def sha256(path: Path) -> str:
    """Hash a file. Raises CheckpointError if it cannot be read."""
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  it reads bytes
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)})") from error


def check_free(target: Path, *, folder: bool) -> None:
    """Raise InputError if a target exists already, unless it is an empty folder and a folder is to be written."""
    if folder and target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: already there, and nothing is overwritten; expected a new path")


def claim(out: Path, besides: tuple[str, ...] = ()) -> None:
    """Make the folder of a new run, or take an empty folder. Drafts of killed writers do not count.

    besides: names that may lie in the folder. Raises InputError: `out` is a file, holds others, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; expected a folder")
    names = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if any(name not in (*besides, LOCK) and not is_draft(Path(name)) for name in names):
        raise InputError(f"--out {out}: holds files of no run; expected an empty folder")
    try:
        reached("make", out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}); expected a folder to write to") from error
    sweep(out)
