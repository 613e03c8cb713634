"""Read and write the published DiT checkpoint (Peebles and Xie, github.com/facebookresearch/DiT): a `.pt`.

Reads the same tensors wherever `contents` finds them. SiT (Ma et al., github.com/willisma/SiT) and REPA (Yu et al.,
github.com/sihyun-yu/REPA) have the same tensors, and `args` with path_type and prediction. Writes `{"ema": state dict,
"args": plain data}`, which `torch.load(weights_only=True)` opens. Shapes tell the architecture. Settings that no shape
shows are written into `args`, and read from there if present.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyndit.errors import CheckpointError, InputError, first_line
from dyndit.files import written_whole
from dyndit.models.dit import CARDS, ClassConditionalDiT, Convention, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.layers import position_features
from dyndit.process import RectifiedFlow
from dyndit.storage import contents
from dyndit.storage.reading import AskedProcess, Loaded, autoencoder_record, built, process_of

OWN = ("x_embedder", "pos_embed", "t_embedder", "y_embedder", "blocks", "final_layer")
"""The modules of a class-conditional DiT. Other modules in a file are no part of its prediction."""


@dataclass(frozen=True)
class Told:
    """Settings that a caller tells about a file, in place of guesses. None: the file alone says it.

    num_heads: attention heads. process: see `process_of`. convention: time and velocity of a flow, see `DiTConfig`.
    weights: "ema" or "model", if the file holds both. num_classes: classes without the null class.
    """

    num_heads: int | None = None
    process: AskedProcess = None
    convention: Convention | None = None
    weights: str | None = None
    num_classes: int | None = None


def read(path: Path, told: Told = Told()) -> Loaded:
    """Read the weights of a published DiT, or of one that its training code's descendants wrote.

    Raises:
        CheckpointError: damaged, of another architecture, or of another process.
        InputError: the number of heads is unknown or impossible, or the file lacks what is asked for.
    """
    found = contents.read(path, told.weights)
    tensors, extra = contents.split(found.tensors, OWN)
    notes = [*found.notes, *(f"{path.name}: ignored {line}, no part of a DiT's prediction" for line in extra)]
    args = _Args.of(path, found.args)
    recorded, convention = args.process()
    if None not in (convention, told.convention) and convention != told.convention:
        raise CheckpointError(f"{path}: args record the convention {convention}, not {told.convention}")
    process, more = process_of(recorded, told.process, path)
    kind = {None: "published DiT checkpoint", "sit": "SiT checkpoint", "repa": "REPA checkpoint"}[convention]
    if isinstance(process, RectifiedFlow) and "process" not in args.found:
        assumed = told.convention or convention or ("repa" if extra[:1] and "projector" in extra[0] else "sit")
        more = (f"{path.name}: time and velocity are taken to be {_CONVENTIONS[assumed]}",)
        if convention is None and told.convention is None:
            others = " or ".join(f"flow:{name}" for name in _CONVENTIONS if name != assumed)
            more = (f"{more[0]}, --process {others} says another",)
    else:
        assumed = told.convention or "timesteps"
    if "pos_embed" not in tensors and contents.ANCHOR in tensors:
        tensors, note = _with_positions(tensors, args, path)
        notes.append(note)
    config, inferred = _infer(tensors, args, path, told, assumed)
    backbone = built(ClassConditionalDiT, asdict(config), path, tensors, path)
    if "trunk" in args.found and args.found["trunk"] != (checksum := backbone.checksum(process=process)):
        recorded = args.found["trunk"]
        raise CheckpointError(f"{path}: damaged or edited (checksum {checksum}, its args record {recorded})")
    pixels = args.take("pixel_space", bool, config.in_channels in (1, 3))
    model = DynamicDepth(backbone, pixel_space=pixels, process=process).eval()
    model.autoencoder = autoencoder_record(args.found.get("autoencoder"), path)
    notes += [*_precision(tensors, path), *inferred, *more]
    return Loaded(model, tuple(notes), kind=kind, ignored=(*found.ignored, *extra))


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
    if model.autoencoder is not None:
        args["autoencoder"] = asdict(model.autoencoder)
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


_CONVENTIONS: dict[Convention, str] = {
    "sit": "SiT's (1 - t / 1000, x_0 - eps)",
    "repa": "REPA's (t / 1000, eps - x_0)",
    "timesteps": "those of this package (t, eps - x_0)",
}
_FLOWS: dict[tuple[object, object], Convention] = {("Linear", "velocity"): "sit", ("linear", "v"): "repa"}
"""Path and prediction, as training scripts of SiT and of REPA name a rectified flow by default."""

_NOISE = {
    "predict_xstart": (False,),
    "predict_v": (False,),
    "noise_schedule": ("linear",),
    "prediction_type": ("epsilon", "eps", "noise"),
    "diffusion_steps": (1000,),
}
"""Options of training scripts that change what is predicted, with the values that mean DDPM."""


@dataclass(frozen=True)
class _Args:
    """The `args` of a checkpoint. Only `args` that `write` made are trusted for the architecture."""

    path: Path
    found: Mapping[str, Any]
    script: Mapping[str, Any]
    """Options of a training script, if `args` is its namespace."""

    @classmethod
    def of(cls, path: Path, args: object) -> "_Args":
        """Tell our own args, a dict with a checksum, from a script's."""
        plain = args if isinstance(args, dict) else vars(args) if hasattr(args, "__dict__") else {}
        theirs = not isinstance(args, dict)
        return cls(path, {} if theirs else plain, plain if theirs or "trunk" not in plain else {})

    def process(self) -> tuple[object, Convention | None]:
        """Return the process in `args` in the form of `Process.config()`, and a flow's convention; None if unnamed.

        Raises CheckpointError: a script was told to train a process that this package does not have.
        """
        named = {name: _setting(self.script, name) for name in ("path_type", "prediction")}
        if any(value is not None for value in named.values()):
            convention = (
                _FLOWS.get((named["path_type"], named["prediction"]))
                if all(isinstance(v, str) for v in named.values())
                else None
            )
            if convention is None:
                said = ", ".join(f"{name} {value!r:.40}" for name, value in named.items())
                expected = " or ".join(f"{path!r} and {prediction!r}" for path, prediction in _FLOWS)
                raise CheckpointError(f"{self.path}: args say {said}; expected {expected}")
            return RectifiedFlow().config(), convention
        for name, expected in _NOISE.items():
            if (value := _setting(self.script, name)) not in (None, "", *expected):
                raise CheckpointError(f"{self.path}: args say {name} {value!r:.40}; expected {expected[0]!r}")
        return self.found.get("process"), None

    def take(self, name: str, kind: type, default: Any) -> Any:
        """Return a checked entry of plain data, or the default if there is no such entry."""
        value = self.found.get(name, default)
        good = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if value is not default and (not good or (kind is not bool and isinstance(value, bool))):
            raise CheckpointError(f"{self.path}: args['{name}'] is {value!r:.40}, expected {kind.__name__}")
        return value


def _setting(options: object, name: str, deep: int = 3) -> object:
    """Find an option of a script, in nested dicts too. None: there is none."""
    if not isinstance(options, Mapping) or not deep:
        return None
    if options.get(name) is not None:
        return options[name]
    return next((v for o in options.values() if (v := _setting(o, name, deep - 1)) is not None), None)


def _precision(tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    names = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"})
    exact = "rounded to" if "float64" in names else "held in"
    return [f"{path.name}: weights in {', '.join(names)}, {exact} float32"] if names else []


def _with_positions(tensors: dict[str, Tensor], args: _Args, path: Path) -> tuple[dict[str, Tensor], str]:
    """Compute positions that a file lacks, for the picture size that its script was told."""
    size, embedder = args.script.get("image_size"), tensors[contents.ANCHOR]
    if type(size) is not int or embedder.ndim != 4:
        raise CheckpointError(
            f"{path}: lacks the tensor pos_embed, and no args record image_size; expected one of the two"
        )
    width, channels, patch, _ = embedder.shape
    side = (size if channels in (1, 3) else size // _PIXELS_A_LATENT) // max(1, patch)
    if not 1 <= side <= _MOST_PATCHES or width % 4:
        raise CheckpointError(f"{path}: args record image_size {size}, which is no size of patches of {patch}")
    note = f"{path.name}: pos_embed is missing; computed for {side} x {side} patches, as image_size {size} in args says"
    return tensors | {"pos_embed": position_features(side, side, width)[None]}, note


_PIXELS_A_LATENT, _MOST_PATCHES = 8, 512


def _grid(positions: Tensor, width: int) -> tuple[int, int]:
    """Return the rows and columns of patches: the square, unless fixed positions tell other numbers."""
    num = positions.shape[1]
    side = isqrt(num)
    if num > _MOST_PATCHES**2 or positions.ndim != 3 or positions.shape[2] != width or width % 4:
        return side, side
    values = positions[0].float()
    for rows in (side, *(r for r in range(1, num + 1) if num % r == 0)):
        columns = num // rows
        if rows * columns == num and torch.allclose(
            values, position_features(rows, columns, width), rtol=0, atol=2**-8
        ):
            return rows, columns
    return side, side


def _classes(args: _Args, path: Path, rows: int, told: Told) -> tuple[int | None, tuple[str, ...]]:
    """Return the classes that a caller or a file tells, or that the rows of the label table suggest; None: rows - 1."""
    recorded = args.take("num_classes", int, None)
    if recorded is None and type(args.script.get("num_classes")) is int:
        recorded = args.script["num_classes"]
    if told.num_classes is not None:
        if told.num_classes not in (rows, rows - 1) or (args.found.get("trunk") and recorded != told.num_classes):
            raise InputError(f"--num-classes {told.num_classes}: {path} has {rows} rows of labels")
        return told.num_classes, ()
    if recorded is None and "label_dropout" not in args.found and rows in _ROUND:
        note = f"{path.name}: {rows} labels are taken for {rows} classes without a null class"
        return rows, (f"{note}; --num-classes {rows - 1} (or num_classes=) says that the last is the null class",)
    return recorded, ()


_ROUND = (10, 100, 1000)
"""Numbers of classes of the usual data sets. A table with exactly so many rows has no null class."""


def _infer(
    tensors: dict[str, Tensor], args: _Args, path: Path, told: Told, convention: Convention
) -> tuple[DiTConfig, tuple[str, ...]]:
    """Infer the architecture from the shapes, and the number of heads from `args` or the width."""
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        num_tokens = tensors["pos_embed"].shape[1]
        rows = tensors["final_layer.linear.weight"].shape[0]
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        num_labels = tensors["y_embedder.embedding_table.weight"].shape[0]
        num_blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    except KeyError as error:
        near = difflib.get_close_matches(error.args[0], list(tensors)[:10_000], 1, 0.0)
        found = f", the closest found is {near[0]:.120}" if near else ""
        raise CheckpointError(f"{path}: no class-conditional DiT (missing {error}{found})") from error
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no class-conditional DiT ({first_line(error)})") from error
    if 0 in (width, channels, patch, num_tokens, rows, hidden, num_labels):
        raise CheckpointError(f"{path}: no class-conditional DiT (a tensor is empty)")
    if num_blocks > len(tensors):
        raise CheckpointError(f"{path}: no class-conditional DiT ({len(tensors)} tensors for {num_blocks} blocks)")
    num_heads, how = _heads(args, path, width, told.num_heads)
    # The row after the last class is the null label, unless the file says that every row is a class.
    num_classes, notes = _classes(args, path, num_labels, told)
    rows_of_patches, columns = _grid(tensors["pos_embed"], width)
    label_dropout = args.take("label_dropout", float, None)
    has_null = num_classes != num_labels if label_dropout is None else label_dropout > 0
    if (shift := args.take("frequency_shift", int, 0)) not in (0, 1):
        raise CheckpointError(f"{path}: args['frequency_shift'] is {shift}, expected 0 or 1")
    try:
        config = DiTConfig(
            image_size=(rows_of_patches * patch, columns * patch),
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
    return config, (*notes, f"{path.name}: {num_heads} attention heads, {how}")


def _heads(args: _Args, path: Path, width: int, given: int | None) -> tuple[int, str]:
    """Return the number of heads, and how it was found."""
    recorded = args.take("num_heads", int, None)
    if recorded is None and type(args.script.get("num_heads")) is int:
        recorded = args.script["num_heads"]
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
