"""Read pictures from data sets of Hugging Face: `save_to_disk` folders and .parquet files. Needs pyarrow."""

# pyright: reportMissingImports=false, reportUnusedImport=false
# pyarrow is an extra.

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dyndit.errors import InputError, first_line
from dyndit.pictures.sources import Source, stamp_of

IMAGES = ("image", "img", "jpg", "png", "webp", "picture")
CLASSES = ("label", "labels", "cls", "class", "fine_label")


class Table(Source):
    """Rows of a data set: a column of pictures, and a column of classes if there is one.

    A picture is bytes, or a struct of `bytes` and `path` as `datasets.Image` stores it.
    """

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        super().__init__(root)
        self._arrow = _pyarrow(root)
        self._files = [str(path) for path in files]
        self._stamps = [stamp_of(path) for path in files]
        schema = self._read(_schema, 0)
        self._column = self._picture_column(schema)
        self._rows: list[tuple[int, int, int]] = []  # file, group, row in it
        label, names = self._class_column(schema)
        labels: list[int] = []
        for number in range(len(files)):
            for group in range(self._read(_num_groups, number)):
                table = self._read(_group, number, group, (label,) if label else (self._column,))
                self._rows += [(number, group, row) for row in range(table.num_rows)]
                labels += table.column(label).to_pylist() if label else []
        self.names = range(len(self._rows))
        if label:
            if any(not isinstance(value, int) or value < 0 for value in labels):
                raise InputError(f"{root}: column {label} has rows without a class, expected one of every picture")
            self.labels = labels
            self.class_names = names or tuple(map(str, range(max(labels, default=0) + 1)))

    def name(self, number: int) -> str:
        """Return file and row."""
        file, group, row = self._rows[number]
        return f"{self._files[file]}: group {group}, row {row}"

    def contents(self, number: int) -> bytes:
        """Return a picture's file."""
        file, group, row = self._rows[number]
        found = self._read(_group, file, group, (self._column,)).column(self._column)[row].as_py()
        if isinstance(found, dict):
            found = found.get("bytes")  # a path alone is not followed: it may lead anywhere
        if not isinstance(found, bytes):
            raise InputError(f"{self.name(number)} holds no bytes of a picture, expected them in column {self._column}")
        return found

    def stamp(self, number: int) -> tuple[int, ...]:
        """Return the file's size and times, and the row."""
        file, group, row = self._rows[number]
        return *self._stamps[file], group, row

    def _read(self, function: Any, number: int, *arguments: object) -> Any:
        try:
            return function(self._files[number], *arguments)
        except Exception as error:  # pyarrow raises OSError, ArrowInvalid, KeyError, ...
            raise InputError(f"{self._files[number]}: unreadable ({first_line(error)}), expected a table") from error

    def _picture_column(self, schema: Any) -> str:
        features = _features(schema)
        typed = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
        known = typed or [name for name in IMAGES if name in schema.names]
        if not known:
            raise InputError(f"{self.root}: columns {', '.join(schema.names)}, expected one of pictures: {IMAGES[0]}")
        return known[0]

    def _class_column(self, schema: Any) -> tuple[str, tuple[str, ...]]:
        features = _features(schema)
        typed = [n for n, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
        whole = [n for n in CLASSES if n in schema.names and self._arrow.types.is_integer(schema.field(n).type)]
        found = next((name for name in CLASSES if name in typed), None) or next(iter([*typed, *whole]), "")
        return found, tuple(map(str, features.get(found, {}).get("names") or ())) if found in typed else ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrow": None}


def table_files(folder: Path) -> list[Path]:
    """Return the tables of a data set's folder; none if it is no such folder. Raises InputError: several splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        raise InputError(f"{folder}: splits {', '.join(splits)}, expected one: {folder / (splits or ['train'])[0]}")
    if (folder / "state.json").is_file() and (found := sorted(folder.glob("*.arrow"))):
        return found
    found = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    splits = sorted({path.name.split("-")[0] for path in found})
    if len(splits) > 1:
        raise InputError(f"{folder}: splits {', '.join(splits)}, expected one, as '{splits[-1]}-*.parquet'")
    return found


def _pyarrow(root: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise InputError(
            f"{root}: a data set of Hugging Face, and no pyarrow; expected `pip install pyarrow`"
        ) from error
    return pyarrow


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that `datasets` notes in a schema: {"label": {"names": [...], "_type": "ClassLabel"}}."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


@lru_cache(maxsize=16)
def _stream(path: str) -> Any:
    import pyarrow

    with pyarrow.memory_map(path) as file:
        try:
            return pyarrow.ipc.open_stream(file).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(file).read_all()


def _schema(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_schema(path) if _is_parquet(path) else _stream(path).schema


def _num_groups(path: str) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).num_row_groups if _is_parquet(path) else 1


@lru_cache(maxsize=2)
def _parquet_group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=list(columns))


def _group(path: str, group: int, columns: tuple[str, ...]) -> Any:
    if _is_parquet(path):
        return _parquet_group(path, group, columns)
    return _stream(path).select(list(columns))
