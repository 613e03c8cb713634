"""Record the calls that a sampler makes of a backbone: data to distil exits on, without a picture set.

A sampler of few guided steps never reaches many states of noised pictures. Recorded calls are states that the sampler
reaches, with their prompts and both guidance branches, in their natural proportion. `record_sampling`
records our own models, `dyndit.record_calls` the pipelines of diffusers.

On disk: a folder of `call-NNNNNN.safetensors`, one per call of the transformer, each written whole or not at all. A
file holds x, t and the conditioning of every row, as the call had them. Example: a call of 2 x 4,096 x 64 latents and
2 x 512 x 4,096 prompt features in bf16 takes 9 MB.
"""

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from dyndit import files, seals
from dyndit.errors import InputError, first_line
from dyndit.models.base import Backbone, Inputs, State
from dyndit.models.conditions import Condition, Conditioning, Value
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import same, tensors_hash
from dyndit.process import Process
from dyndit.sampling.sample import Samples, sample

FORMAT, VERSION = "dyndit-call", "1"
MOST_HASHED = 1_000_000_000
"""A backbone of more parameters is recorded by its family alone: hashing it takes longer than recording."""

_NAME = re.compile(r"call-(\d{6,})\.safetensors")


def record_sampling(model: DynamicDepth, labels: Sequence[Value], out: str | Path, **options: Any) -> Samples:
    """Draw pictures with `sample(model, labels, **options)`, and record the backbone's calls in the folder `out`.

    Raises InputError: see `sample`; or `out` holds other files.
    """
    recording = Recording.open(Path(out), model.backbone, model.process)
    backbone = _Watched(model.backbone, recording)
    watched = DynamicDepth(backbone, model.exits, pixel_space=model.pixel_space, process=model.process)
    return sample(watched, labels, **options)


def recorded_sampling(
    model: DynamicDepth, labels: Sequence[Value], folder: str | Path, **options: Any
) -> "RecordedCalls":
    """Return the calls of `record_sampling(model, labels, folder, **options)`. An existing `folder` is read, not drawn.

    Raises InputError: see `record_sampling`; or `folder` holds another backbone's calls.
    """
    folder = Path(folder)
    if not folder.exists():
        files.sweep(folder.parent, ours=False)
        with files.written_whole(folder, folder=True) as draft:
            record_sampling(model, labels, draft, **options)
    calls = RecordedCalls(folder)
    calls.check(model)
    return calls


@dataclass
class Recording:
    """Write calls to a folder. num_calls and num_rows count the calls and rows that this recording added."""

    folder: Path
    family: str
    backbone: str
    num_calls: int = 0
    num_rows: int = 0
    _next: int = field(default=0, repr=False)

    @classmethod
    def open(cls, folder: Path, backbone: Backbone, process: Process | None = None) -> "Recording":
        """Make the folder, or go on in a folder of this backbone's calls.

        Raises InputError: the folder holds other files, or another backbone's calls.
        """
        small = sum(p.numel() for p in backbone.parameters()) <= MOST_HASHED
        family, identity = backbone.family, backbone.identity(process=process) if small else ""
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        paths = _paths(folder)
        if paths:
            there = _Header.read(paths[0])
            if there.family != family or not same(there.backbone, identity):
                raise InputError(
                    f"{folder}: holds calls of {there.family} {there.backbone}, this is {family} {identity}; expected "
                    "another folder"
                )
        after = _number(paths[-1]) + 1 if paths else 0
        return cls(folder, family, identity, _next=after)

    def write(self, inputs: Inputs) -> None:
        """Add a call of the transformer.

        Raises InputError: a shared argument that JSON cannot hold, or a row argument with another number of rows.
        """
        given = inputs.y if isinstance(inputs.y, Conditioning) else Conditioning({"y": inputs.y})
        rows = dict(given.rows)
        for name, value in rows.items():
            if len(value) != len(inputs):
                raise InputError(
                    f"{self.family}: called with {len(value)} rows of {name}, expected {len(inputs)} as of the latents"
                )
        shared = dict(given.shared)
        tensors = {"x": inputs.x, "t": inputs.t} | {f"rows.{name}": value for name, value in rows.items()}
        tensors = {name: _at_rest(value) for name, value in tensors.items()}
        fixed = {name: _at_rest(value) for name, value in shared.items() if isinstance(value, Tensor)}
        facts = {
            "family": self.family,
            "backbone": self.backbone,
            "labels": not isinstance(inputs.y, Conditioning),
            "digest": tensors_hash(tensors),
            "shared": {name: self._plain(name, value) for name, value in shared.items() if name not in fixed}
            | {name: {"tensor": tensors_hash({"": value})} for name, value in fixed.items()},
        }
        metadata = {"format": FORMAT, "version": VERSION, "call": json.dumps(facts, sort_keys=True)}
        tensors |= {f"shared.{name}": value for name, value in fixed.items()}
        if odd := seals.first_not_finite(tensors):
            raise InputError(f"{self.family}: call {self._next} has {odd} that is not finite; expected finite numbers")
        metadata |= {seals.SEAL: seals.tensors_checksum(tensors, metadata)}
        files.write_safetensors(self.folder / f"call-{self._next:06d}.safetensors", tensors, metadata)
        self._next += 1
        self.num_calls += 1
        self.num_rows += len(inputs)

    def _plain(self, name: str, value: object) -> object:
        """Convert a shared argument to plain JSON."""
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise InputError(f"{self.family}: called with {name} of type {kind}, which cannot be recorded") from error


class RecordedCalls(Dataset[Any]):
    """Rows of recorded calls, for `training.fit`. Item i is (x, {"t": ..., and the row's conditioning by name}).

    Items have the calls' shapes without the batch: x (C, H, W), or the shape of the family's latents; t ().
    """

    can_flip = False

    def __init__(self, folder: str | Path) -> None:
        """Read the headers.

        Raises:
            InputError: the folder holds no recorded calls, or a file cannot be read; calls differ in the shape of their
                rows (another resolution) or in shared arguments.
        """
        self.folder = Path(folder)
        paths = _paths(self.folder) if self.folder.is_dir() else []
        if not paths:
            raise InputError(f"{self.folder}: holds no recorded call; expected a folder that record_calls has written")
        headers = [_Header.read(path) for path in paths]
        for header in headers[1:]:
            headers[0].check_like(header)
        first = headers[0]
        self.family, self.backbone = first.family, first.backbone
        self._labels, self._paths = first.labels, paths
        self._checked: set[int] = set()
        self._check(0)
        self._starts = [0, *itertools.accumulate(header.num_rows for header in headers)]
        self._shared = first.read_shared()
        content = json.dumps([first.common(), [header.digest for header in headers]], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return row `index` of all calls, in the order of recording.

        Raises CheckpointError: the call's file is damaged. It is checked when its first row is read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        self._check(number)
        row = index - self._starts[number]
        with safe_open(self._paths[number], "pt") as file:
            values = {name: file.get_slice(name)[row : row + 1][0] for name in file.keys() if name[:7] != "shared."}  # noqa: SIM118
        x = values.pop("x")
        return x, {name.removeprefix("rows."): value for name, value in values.items()}

    def _check(self, number: int) -> None:
        """Compare a file with its checksum, once."""
        if number not in self._checked:
            seals.check_tensors(self._paths[number], *files.read_safetensors(self._paths[number]))
            self._checked.add(number)

    def inputs(self, x: Tensor, rows: Any) -> Inputs:
        """Make the transformer's inputs from a batch of items.  x: (B, ...), rows: B each."""
        rows = dict(rows)
        t = rows.pop("t")
        if self._labels:
            return Inputs(x, t, rows["y"])
        shared = {n: v.to(x.device) if isinstance(v, Tensor) else v for n, v in self._shared.items()}
        return Inputs(x, t, Conditioning(rows, shared))

    def check(self, model: DynamicDepth) -> None:
        """Refuse another backbone's calls. Raises InputError, which names both backbones."""
        found, wanted = self.family, model.backbone.family
        if self.backbone:
            found, wanted = self.backbone, model.identity.backbone
        if not same(found, wanted):
            raise InputError(f"{self.folder}: calls of {found}, but the model is {wanted}; expected its own")


@dataclass(frozen=True)
class _Header:
    """A call's file without its tensors."""

    path: Path
    family: str
    backbone: str
    labels: bool
    digest: str
    shared: dict[str, Any]
    rows: dict[str, tuple[str, list[int]]]
    """Dtype and shape of each tensor that has rows."""

    @classmethod
    def read(cls, path: Path) -> "_Header":
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys() if name[:7] != "shared."}  # noqa: SIM118
                rows = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise InputError(f"{path}: expected a {FORMAT} file of version {VERSION}")
            found = cls(path, **json.loads(metadata["call"]), rows=rows)
            found._check_plain()
            return found
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            reason = first_line(error)
            raise InputError(f"{path}: no readable recorded call ({reason}); expected it whole, or deleted") from error

    def _check_plain(self) -> None:
        """Refuse entries of other types, and tensors of other numbers of rows. Raises ValueError."""
        kinds = {"family": str, "backbone": str, "labels": bool, "digest": str, "shared": dict}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} is {value!r:.40}")
        if not self.rows.keys() >= {"x", "t", *(["rows.y"] if self.labels else [])}:
            raise ValueError(f"it holds {', '.join(sorted(self.rows)) or 'nothing'}")
        if len({tuple(shape[:1]) for _, shape in self.rows.values()}) != 1 or not self.rows["x"][1][:1]:
            raise ValueError("its tensors have different numbers of rows")

    @property
    def num_rows(self) -> int:
        return self.rows["x"][1][0]

    def common(self) -> dict[str, Any]:
        """Return the facts that all calls of a data set share."""
        rows = {name: [dtype, shape[1:]] for name, (dtype, shape) in sorted(self.rows.items())}
        kept = {name: getattr(self, name) for name in ("family", "backbone", "labels", "shared")}
        return kept | {"rows": rows}

    def check_like(self, other: "_Header") -> None:
        """Refuse a call that cannot be batched with this one.

        Raises InputError, which names the file and the argument.
        """
        mine, theirs = self.common(), other.common()
        for kind in ("rows", "shared"):
            here, there = mine.pop(kind), theirs.pop(kind)
            for name in sorted(here.keys() | there.keys()):
                if here.get(name) != there.get(name):
                    found, expected = (_words(values.get(name)) for values in (there, here))
                    raise InputError(
                        f"{other.path}: {name.removeprefix('rows.')} {found}, but {expected} in {self.path.name}; "
                        "expected calls of one resolution and one kind in a folder"
                    )
        for name in mine:
            if mine[name] != theirs[name]:
                raise InputError(f"{other.path}: {name} {theirs[name]}, but {mine[name]} in {self.path.name}")

    def read_shared(self) -> dict[str, Any]:
        """Read the shared arguments, with their tensors."""
        with safe_open(self.path, "pt") as file:
            tensors = {n[7:]: file.get_tensor(n) for n in file.keys() if n[:7] == "shared."}  # noqa: SIM118
        return self.shared | tensors


class _Watched(Backbone):
    """Record a backbone's calls, and pass everything on to the backbone."""

    def __init__(self, backbone: Backbone, recording: Recording) -> None:
        super().__init__()
        self.backbone, self.recording = backbone, recording
        self.num_blocks, self.width = backbone.num_blocks, backbone.width
        vars(self)["family"] = backbone.family
        self.sample_shape, self.out_channels = backbone.sample_shape, backbone.out_channels
        self.condition = backbone.condition

    def embed(self, x: Tensor, t: Tensor, y: Condition) -> State:
        """Record the call, then embed with the backbone."""
        self.recording.write(Inputs(x, t, y))
        return self.backbone.embed(x, t, y)

    def block(self, index: int, state: State) -> State:
        return self.backbone.block(index, state)

    def block_modules(self) -> list[nn.Module]:
        return self.backbone.block_modules()

    def head(self, state: State) -> Tensor:
        return self.backbone.head(state)

    def unpatchify(self, patches: Tensor, state: State) -> Tensor:
        return self.backbone.unpatchify(patches, state)

    def identity(self, tensors: Mapping[str, Tensor] | None = None, process: Process | None = None) -> str:
        return self.backbone.identity(tensors, process)


def _paths(folder: Path) -> list[Path]:
    """List the calls in a folder, in order. Raises InputError: the folder holds other files."""
    paths = [path for path in folder.iterdir() if not files.is_draft(Path(path.name))]
    if other := sorted(path.name for path in paths if not _NAME.fullmatch(path.name)):
        raise InputError(f"{folder}: holds {other[0]}; expected an empty folder, or one of recorded calls alone")
    return sorted(paths, key=lambda path: _number(path))


def _number(path: Path) -> int:
    """Return the number in the name of a call's file."""
    return int(path.stem.rpartition("-")[2])


def _at_rest(value: Tensor) -> Tensor:
    """Copy a tensor to the host, contiguous, for safetensors."""
    return value.detach().to("cpu", copy=True).contiguous()


def _words(value: object) -> str:
    """Describe a header's entry in a message: the dtype and shape of rows, or a plain value."""
    if value is None:
        return "absent"
    if isinstance(value, dict) and "tensor" in value:
        return f"tensor {value['tensor']}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
