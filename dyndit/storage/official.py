"""Read and write the published DiT checkpoint (Peebles and Xie, github.com/facebookresearch/DiT): a `.pt`.

Reads a raw state dict, or a training checkpoint with `ema`, `model`, `opt` and `args`. SiT's checkpoints (Ma et al.,
github.com/willisma/SiT) have the same tensors, and `args` with path_type and prediction. Writes `{"ema": state dict,
"args": plain data}`, which `torch.load(weights_only=True)` opens. Shapes tell the architecture. Settings that no shape
shows are written into `args`, and read from there if present.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.files import written_whole
from dyndit.models.dit import CARDS, ClassConditionalDiT, Convention, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import RectifiedFlow
from dyndit.storage.reading import AskedProcess, Loaded, built, process_of, read_pickled


def read(path: Path, num_heads: int | None = None, asked: AskedProcess = None) -> Loaded:
    """Read a published checkpoint.

    num_heads: needed if neither `args` nor the width tells it; a contradiction is refused. asked: the process to use,
    see `process_of`.

    Raises:
        CheckpointError: damaged, of another architecture, or of another process.
        InputError: the number of heads is unknown or impossible.
    """
    tensors, args, notes = _contents(path)
    recorded = args.process()
    process, more = process_of(recorded, asked, path)
    foreign = isinstance(process, RectifiedFlow) and "process" not in args.found
    if foreign:
        more = (f"{path.name}: time and velocity are taken to be SiT's (1 - t / 1000, x_0 - eps)",)
    config, heads_note = _infer(tensors, args, path, num_heads, "sit" if foreign else "timesteps")
    backbone = built(ClassConditionalDiT, asdict(config), path, tensors, path)
    if "trunk" in args.found and args.found["trunk"] != (checksum := backbone.checksum(process=process)):
        found = args.found["trunk"]
        raise CheckpointError(f"{path}: damaged or edited (checksum {checksum}, its args record {found})")
    pixels = args.take("pixel_space", bool, config.in_channels in (1, 3))
    model = DynamicDepth(backbone, pixel_space=pixels, process=process)
    return Loaded(model.eval(), (*notes, heads_note, *more))


def write(model: DynamicDepth, path: Path) -> None:
    """Write the backbone, and in `args` the settings that its tensors do not show. This format cannot hold exits.

    Raises InputError: the backbone is no `ClassConditionalDiT`.
    """
    backbone = model.backbone
    if not isinstance(backbone, ClassConditionalDiT):
        raise InputError(f"{path}: the official format holds class-conditional DiTs, not a {type(backbone).__name__}")
    config = backbone.config()
    if config["conditioning"] != "adaln-zero":
        raise InputError(f"{path}: the official format holds adaln-zero, not the conditioning {config['conditioning']}")
    args = config | {
        "pixel_space": model.pixel_space,
        "process": model.process.config(),
        "trunk": backbone.checksum(process=model.process),
    }
    # Clone, so that a view is stored without the rest of its memory.
    ema = {name: tensor.detach().cpu().clone() for name, tensor in backbone.state_dict().items()}
    with written_whole(path) as draft:
        try:
            torch.save({"ema": ema, "args": args}, draft)
        except RuntimeError as error:  # torch.save raises it on a full disk
            raise OSError(first_line(error)) from error


def as_published(config: DiTConfig) -> DiTConfig:
    """Return the same sizes with the settings that the published code hard-codes."""
    return replace(config, norm_eps=1e-6, mlp_norm_eps=1e-6, frequency_shift=0)


_SIT = ("Linear", "velocity")
"""Defaults of `--path-type` and `--prediction` in SiT's training script: a rectified flow."""


@dataclass(frozen=True)
class _Args:
    """The `args` of a checkpoint. Only `args` that `write` made are trusted for the architecture."""

    path: Path
    found: Mapping[str, object]
    num_classes: int | None = None
    """Option of the published training script, if `args` is its namespace."""
    path_type: object = None
    prediction: object = None
    """Option of SiT's training script, and so is `path_type`."""

    def process(self) -> object:
        """Return the process in `args` in the form of `Process.config()`; None if `args` name no process.

        Raises CheckpointError: SiT's script was told to train another process than its default.
        """
        if (self.path_type, self.prediction) == (None, None):
            return self.found.get("process")
        if (self.path_type, self.prediction) != _SIT:
            raise CheckpointError(
                f"{self.path}: args say path_type {self.path_type!r:.40}, prediction {self.prediction!r:.40}; expected "
                f"{_SIT[0]!r} and {_SIT[1]!r}"
            )
        return RectifiedFlow().config()

    def take(self, name: str, kind: type, default: object) -> object:
        """Return a checked entry of plain data, or the default if there is no such entry."""
        value = self.found.get(name, default)
        good = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if value is not default and (not good or (kind is not bool and isinstance(value, bool))):
            raise CheckpointError(f"{self.path}: args['{name}'] is {value!r:.40}, expected {kind.__name__}")
        return value


def _contents(path: Path) -> tuple[dict[str, Tensor], _Args, tuple[str, ...]]:
    """Read the state dict, its args, and a note that names the used part of the file."""
    data, notes, args = read_pickled(path), (), None
    if isinstance(data, dict):
        args = data.get("args")
        for key in ("ema", "model"):
            if isinstance(data.get(key), dict):
                data, notes = data[key], (f"{path.name}: training checkpoint, using '{key}'",)
                break
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"{path}: expected a state dict, or a checkpoint holding 'ema' or 'model'")
    if not all(isinstance(name, str) for name in data):
        raise CheckpointError(f"{path}: expected a state dict, with names for its tensors")
    theirs = isinstance(args, argparse.Namespace)
    told = vars(args) if theirs else args if isinstance(args, dict) else {}
    count = told.get("num_classes") if theirs and isinstance(told.get("num_classes"), int) else None
    return data, _Args(path, {} if theirs else told, count, told.get("path_type"), told.get("prediction")), notes


def _infer(
    tensors: dict[str, Tensor], args: _Args, path: Path, num_heads: int | None, convention: Convention
) -> tuple[DiTConfig, str]:
    """Infer the architecture from the shapes, and the number of heads from `args` or the width."""
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        num_tokens = tensors["pos_embed"].shape[1]
        rows = tensors["final_layer.linear.weight"].shape[0]
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        num_labels = tensors["y_embedder.embedding_table.weight"].shape[0]
        num_blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    except KeyError as error:
        raise CheckpointError(f"{path}: no class-conditional DiT (missing {error})") from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no class-conditional DiT ({first_line(error)})") from error
    if 0 in (width, channels, patch, num_tokens, rows, hidden, num_labels):
        raise CheckpointError(f"{path}: no class-conditional DiT (a tensor is empty)")
    if num_blocks > len(tensors):
        raise CheckpointError(f"{path}: no class-conditional DiT ({len(tensors)} tensors for {num_blocks} blocks)")
    num_heads, how = _heads(args, path, width, num_heads)
    # The row after the last class is the null label, unless the file says that every row is a class.
    num_classes = args.take("num_classes", int, args.num_classes)
    label_dropout = args.take("label_dropout", float, None)
    has_null = num_classes != num_labels if label_dropout is None else label_dropout > 0
    if (shift := args.take("frequency_shift", int, 0)) not in (0, 1):
        raise CheckpointError(f"{path}: args['frequency_shift'] is {shift}, expected 0 or 1")
    try:
        config = DiTConfig(
            image_size=isqrt(num_tokens) * patch,
            patch_size=patch,
            in_channels=channels,
            width=width,
            num_blocks=num_blocks,
            num_heads=num_heads,
            mlp_ratio=args.take("mlp_ratio", float, hidden / width),
            num_classes=num_labels - has_null,
            label_dropout=label_dropout if label_dropout is not None else 0.1 * has_null,
            learn_variance=rows == 2 * channels * patch**2,
            norm_eps=args.take("norm_eps", float, 1e-6),
            mlp_norm_eps=args.take("mlp_norm_eps", float, 1e-6),
            frequency_shift=shift,
            convention=args.take("convention", str, convention),
        )
    except InputError as error:
        raise CheckpointError(f"{path}: no class-conditional DiT ({error})") from error
    for name, value in asdict(config).items():
        if args.found.get("trunk") and args.found.get(name, value) != value:
            raise CheckpointError(f"{path}: args['{name}'] is {args.found[name]!r:.40}, but the tensors tell {value!r}")
    return config, f"{path.name}: {num_heads} attention heads, {how}"


def _heads(args: _Args, path: Path, width: int, given: int | None) -> tuple[int, str]:
    """Return the number of heads, and how it was found."""
    recorded = args.take("num_heads", int, None)
    if recorded is not None:
        if given not in (None, recorded):
            raise InputError(f"--num-heads {given}: {path} records {recorded}")
        if recorded < 1 or width % recorded:
            raise CheckpointError(f"{path}: args['num_heads'] is {recorded}, which does not divide the width {width}")
        return recorded, "as its args record"
    if given is not None:
        if given < 1 or width % given:
            raise InputError(f"--num-heads {given}: does not divide the width {width}")
        return given, "as given"
    by_width = {card.width: card.num_heads for card in CARDS.values()}
    found = by_width.get(width) or (width // 64 if width % 64 == 0 else None)
    if found is None:
        raise InputError(f"{path}: width {width} tells no number of heads; expected --num-heads")
    return found, "of the card of this width" if width in by_width else "64 wide"
