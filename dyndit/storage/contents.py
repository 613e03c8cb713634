"""Find the weights of a DiT in a file of any dialect: which tensors are taken, under which names, and what is left.

Training scripts nest the state dict ("ema", "model_ema", "state_dict", "net", ...), and wrappers prefix its names
("module.", "_orig_mod.", "model.", "ema_model.", ...). A state dict is found by the name that every DiT has, `ANCHOR`:
the text before it is the prefix, and the dicts around it are the place. So neither needs a list.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndit.errors import CheckpointError, InputError
from dyndit.files import opened, read_json, read_safetensors
from dyndit.storage.reading import read_pickled

ANCHOR = "x_embedder.proj.weight"
"""Name of the tensor that embeds patches, in the published DiT, in timm and in SiT."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch's own wrappers add, in any order and at any place."""

USUAL = ("ema", "model", "model_ema", "ema_model", "state_dict", "model_state_dict", "net")
"""Places where state dicts are looked for if no tensor has the name of a DiT's. For messages."""

_ARGS = ("args", "config", "cfg", "hyper_parameters", "hparams", "opt_args")
_TRAINING = ("opt", "optimizer", "optimizers", "optim", "optimizer_states", "optimizer_state_dict", "scaler", "rng")
_DEEPEST, _MOST_NAMED = 4, 8
_NO_PLACE = "the tensors without prefix"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """The weights in a file, under the names of the published code.

    args: settings of the training script beside them; None if there are none. notes: what was taken and stripped, a
    line each. ignored: what else the file holds, a line each.
    """

    tensors: Tensors
    args: object = None
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A state dict within a file. place: the dicts and the prefix that lead to it: "ema", "state_dict.net"."""

    place: str
    tensors: Tensors
    stripped: frozenset[str]

    @property
    def averaged(self) -> bool:
        return any(re.search(r"(^|_)ema(_|$)|averag", part, re.IGNORECASE) for part in self.place.split("."))

    @property
    def group(self) -> str:
        """Return what `weights` calls it: "ema" for an average, else "model"."""
        return "ema" if self.averaged else "model"


def read(path: Path, weights: str | None = None) -> Contents:
    """Read the weights of a file: a pickle of `torch.save`, safetensors, or the index of a sharded file.

    weights: "ema" or "model" if the file holds both, or the place of a state dict, such as "ema_0.9999" (default: the
    first average, else the first state dict).

    Raises:
        CheckpointError: the file is damaged, or holds no state dict.
        InputError: the file lacks the asked weights.
    """
    data: Any = everything(path)
    args = next((_options(data[name], name) for name in _ARGS if isinstance(data, dict) and name in data), None)
    found = list(_state_dicts(data, path))
    if not found:
        return _unrecognised(data, args, path)
    wanted = [f for f in found if weights in (None, f.place, f.group)]
    if not wanted:
        held = ", ".join(f.place or _NO_PLACE for f in found)
        raise InputError(
            f"--weights {weights:.40}: {path} holds only {held:.200}; expected ema or model, if it has both"
        )
    chosen = next((f for f in wanted if f.averaged), wanted[0])
    others = [f for f in found if f is not chosen]
    notes = [_chosen_note(path, chosen, others)] if chosen.place or others else []
    if chosen.stripped:
        notes.append(f"{path.name}: stripped {' and '.join(sorted(chosen.stripped))} from the names of tensors")
    unused = [f"{f.place or _NO_PLACE} ({len(f.tensors)} tensors)" for f in others]
    extra, of_training = _beside(data, {id(tensor) for f in found for tensor in f.tensors.values()})
    notes += [f"{path.name}: ignored {line}" for line in extra]
    return Contents(chosen.tensors, args, tuple(notes), (*unused, *extra, *of_training))


def _options(value: Any, name: str) -> object:
    """Return a script's options as a namespace. A dict under "args" stays a dict: `official.write` makes one."""
    plain = name != "args" and isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return Namespace(**value) if plain else value


def everything(path: Path) -> object:
    """Read all that a file holds. Its first bytes tell the format, not its name.

    Raises CheckpointError: damaged, a Git LFS pointer, or of no known format.
    """
    try:
        with opened(path) as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if head[:1] == b"{":
        return _sharded(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        tensors, metadata = read_safetensors(path)
        if "dyndit" in metadata.get("format", ""):
            raise CheckpointError(f"{path}: weights of a {metadata['format']} folder; expected the folder itself")
        return tensors
    return read_pickled(path)


def is_index(path: Path) -> bool:
    """Tell if a file's name is that of the index of sharded weights."""
    return path.name.endswith((".safetensors.index.json", ".bin.index.json"))


def sharded(path: Path, read_shard: Callable[[Path], Tensors]) -> Tensors:
    """Read the tensors of all files in an index. Each file must hold exactly the tensors that the index gives it.

    read_shard: reads one file -> its tensors.

    Raises CheckpointError: the index is damaged, or a file is missing or holds other tensors.
    """
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{path}: expected a weight_map from tensors to files")
    tensors: Tensors = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: names {shard!r:.80}, expected a file of this folder")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: names {shard!r:.80}, which is missing")
        found = read_shard(path.parent / shard)
        if odd := found.keys() ^ {name for name, file in shards.items() if file == shard}:
            raise CheckpointError(
                f"{path.parent / shard}: does not hold the tensors {path.name} gives it, first {min(odd)}"
            )
        tensors |= found
    return tensors


def _sharded(path: Path) -> Tensors:
    def shard(file: Path) -> Tensors:
        held = everything(file)
        if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()):
            raise CheckpointError(f"{file}: expected a state dict")
        return held

    return sharded(path, shard)


def split(tensors: Mapping[str, Tensor], own: Iterable[str]) -> tuple[Tensors, tuple[str, ...]]:
    """Split a state dict into the tensors of the model's own modules, and lines about other modules.

    own: names of the model's tensors or modules.

    A module beside the model's own, such as the projectors of REPA, is a help to training: the prediction does not pass
    through it. A module whose name says that it embeds, holds tokens or blocks, or rotates is kept, so that strict
    loading refuses it.
    """
    tops = {name.partition(".")[0] for name in own}
    others = {top for name in tensors if (top := name.partition(".")[0]) not in tops and not _TAKES_PART.search(top)}
    extra = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in others}
    kept = {name: t for name, t in tensors.items() if name not in extra}
    return kept, tuple(summary(extra))


_TAKES_PART = re.compile(r"embed|token|block|layers|rope|freqs|rotary|register", re.IGNORECASE)


def summary(tensors: Mapping[str, Any]) -> list[str]:
    """Count names by their first part: ["projectors.* (6 tensors)", "step"]."""
    counts = Counter(name.partition(".")[0] for name in tensors)
    lines = [top if top in tensors else f"{top}.* ({counts[top]} tensors)" for top in sorted(counts)]
    more = len(lines) - _MOST_NAMED
    return [*lines[:_MOST_NAMED], f"and {more} more"] if more > 0 else lines


def _state_dicts(data: object, path: Path, place: tuple[str, ...] = ()) -> Iterator[_Found]:
    """Yield every state dict of a DiT in nested dicts, each prefix by itself."""
    if not isinstance(data, Mapping) or len(place) > _DEEPEST:
        return
    named = {name: value for name, value in data.items() if isinstance(name, str)}
    own = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    prefixes = sorted(n.removesuffix(ANCHOR) for n in map(_unwrapped, own) if f".{n}".endswith(f".{ANCHOR}"))
    found = [_under(own, prefix, prefixes, path, place) for prefix in dict.fromkeys(prefixes)]
    yield from found
    for prefix in ("model_ema.", "ema."):
        if found and prefix not in prefixes and (undotted := _undotted(own, prefix, found[0].tensors)):
            yield _Found(".".join((*place, prefix.rstrip("."))), undotted, frozenset())
    for name, value in named.items():
        yield from _state_dicts(value, path, (*place, name))


def _unwrapped(name: str) -> str:
    """Drop the parts of a name that wrappers of torch add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _under(own: Tensors, prefix: str, prefixes: list[str], path: Path, place: tuple[str, ...]) -> _Found:
    """Take the tensors under a prefix, and under no longer one. Strip the prefix and the parts of wrappers."""
    inner = [other for other in prefixes if other != prefix and other.startswith(prefix)]
    taken, stripped = {}, {prefix} if prefix else set()
    for raw, tensor in own.items():
        name = _unwrapped(raw)
        if not name.startswith(prefix) or any(name.startswith(other) for other in inner):
            continue
        if (name := name.removeprefix(prefix)) in taken:
            raise CheckpointError(f"{path}: holds {name} twice, once as {raw:.120}")
        taken[name] = tensor
        stripped |= {f"{part}." for part in raw.split(".") if part in WRAPPERS}
    return _Found(".".join((*place, *([prefix.rstrip(".")] if prefix else []))), taken, frozenset(stripped))


def _undotted(own: Tensors, prefix: str, model: Tensors) -> Tensors:
    """Give back the dots of an average whose names lost them: "model_ema.x_embedderprojweight"."""
    named = {name: own.get(f"{prefix}{name.replace('.', '')}") for name in model}
    averaged = {name: tensor for name, tensor in named.items() if tensor is not None}
    return model | averaged if ANCHOR in averaged else {}


def _chosen_note(path: Path, chosen: _Found, others: list[_Found]) -> str:
    """Say which state dict is used, and how to ask for each other one that differs."""
    note, groups = f"{path.name}: training checkpoint, using '{chosen.place or _NO_PLACE}'", {chosen.group}
    for other in others:
        if not _equal(other.tensors, chosen.tensors):
            asked = (other.place if other.group in groups else "") or other.group
            note += f"; '{other.place or _NO_PLACE}' differs, --weights {asked} takes it"
        groups.add(other.group)
    return note


def _equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        t is b[name] or (t.shape == b[name].shape and t.dtype == b[name].dtype and torch.equal(t, b[name]))
        for name, t in a.items()
    )


def _beside(data: Mapping[str, Any], taken: set[int], place: str = "") -> tuple[list[str], list[str]]:
    """List what a file holds beside its state dicts -> other tensors, and the state of training: optimisers, counts."""
    told = {n: v for n, v in data.items() if isinstance(n, str) and (place or n not in _ARGS)}
    rest = {n: v for n, v in told.items() if not _holds(v, taken)}
    tensors = {n: v for n, v in rest.items() if n.partition(".")[0] not in _TRAINING and _has_tensors(v)}
    others = [place + line for line in summary({n: v for n, v in rest.items() if n not in tensors})]
    found = [place + line for line in summary(tensors)]
    for name, value in told.items():
        if isinstance(value, Mapping) and name not in rest and place.count(".") < _DEEPEST:
            more, of_training = _beside(value, taken, f"{place}{name}.")
            found, others = found + more, others + of_training
    return found, others


def _has_tensors(value: object, deep: int = _DEEPEST) -> bool:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor) or (deep > 0 and any(_has_tensors(v, deep - 1) for v in values))


def _holds(value: object, taken: set[int], deep: int = _DEEPEST + 1) -> bool:
    inner = value.values() if isinstance(value, Mapping) and deep else ()
    return id(value) in taken or any(_holds(v, taken, deep - 1) for v in inner)


def _unrecognised(data: object, args: object, path: Path) -> Contents:
    """Return a state dict without a DiT's tensors, for the caller to refuse by name. Refuse anything else."""
    nested = [data[key] for key in USUAL if isinstance(data, dict) and isinstance(data.get(key), dict)]
    tensors = nested[0] if nested else data
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise CheckpointError(f"{path}: expected a state dict, or a checkpoint holding 'ema' or 'model'")
    if not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{path}: expected a state dict, with names for its tensors")
    theirs = next((n for n in tensors if n.startswith(("transformer_blocks.", "pos_embed.proj."))), None)
    if theirs is not None:
        raise CheckpointError(
            f"{path}: has diffusers' names (found {theirs}, expected {ANCHOR}); expected its folder with config.json"
        )
    return Contents(tensors, args)
