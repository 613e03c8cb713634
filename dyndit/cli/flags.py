"""Flags that several verbs share, and functions that read them."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import tyro

from dyndit import bounds
from dyndit.errors import CheckpointError, InputError, did_you_mean
from dyndit.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from diffusers import ModelMixin

    from dyndit.models.dynamic import DynamicDepth
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.step_counts import Goal
    from dyndit.plans.table import ShiftTable
    from dyndit.progress import Advance

T = TypeVar("T")
P = ParamSpec("P")
Positional = tyro.conf.Positional
Unnamed = Annotated[T, tyro.conf.arg(name="")]
"""A group of flags without the group's name before each flag."""
NumHeads = Annotated[int | None, tyro.conf.arg(help="Attention heads of a .pt whose width does not tell them.")]
CfgScale = Annotated[float, tyro.conf.arg(help="Guidance scale; 1 is unguided.")]
BatchSize = Annotated[int, tyro.conf.arg(help="Pictures at a time.")]
NumClasses = Annotated[int | None, tyro.conf.arg(help="Classes, without the null class, of a file that does not tell.")]
Weights = Annotated[str | None, tyro.conf.arg(help="ema, model or a key of a training checkpoint (default: ema).")]
Vae = Annotated[
    Path | None,
    tyro.conf.arg(
        help="Folder or hub id of an autoencoder of diffusers, or mse or ema for the published ones (default: the one "
        "in a pipeline's folder; of a card: mse)."
    ),
]
Device = Annotated[str, tyro.conf.arg(help="auto, cpu or cuda; auto is a GPU if there is one.")]
_OWN = "own is the weights'; auto is bfloat16 on a GPU that computes in it, else own"
Dtype = Annotated[str, tyro.conf.arg(help=f"Precision to compute in: auto, own, float32, bfloat16 or float16. {_OWN}.")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="End with one line of JSON.")]


def also(*names: str) -> object:
    """Accept further names of a flag, for example those of the published code's scripts."""
    return tyro.conf.arg(aliases=tuple(f"--{name}" for name in names))


@dataclass(frozen=True)
class PublishedSampling:
    """Sample as the published DiT's own scripts do, with their flags. `--model CARD` takes the place of MODEL.

    Args:
        model: A card: DiT-XL/2, DiT-B/4, ... It sets the scripts' solver (ddpm), steps (250), scale (4, or 1.5 with
            --num-images), guided channels (3) and classes, unless they are given.
        ckpt: The card's weights (default: pretrained_models/DiT-XL-2-256x256.pt, or 512x512).
        image_size: Side of the card's pictures: 256 (the default) or 512.
        num_classes: Classes of the card (default: 1000).
        sample_dir: Folder for the folder of samples, if --out is not given.
        tf32: Let a GPU round products to TF32.
        no_tf32: Keep products in full precision.
    """

    model: str = ""
    ckpt: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    sample_dir: Path = Path("samples")
    tf32: bool = False
    no_tf32: bool = False

    @property
    def card(self) -> str:
        """Return the card of name and size; empty without a name.

        Raises:
            InputError: no such card, or flags of a card without a card.
        """
        from dyndit.storage.published import card_of

        if self.model:
            return card_of(self.model, self.image_size)
        for name in ("ckpt", "image_size", "num_classes"):
            if (value := getattr(self, name)) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: belongs to a card; expected --model CARD with it"
                )
        return ""

    def set_precision(self) -> None:
        """Allow or forbid TF32, if a flag says so."""
        import torch

        if self.tf32 and self.no_tf32:
            raise InputError("--tf32 and --no-tf32: both given; expected one of them")
        if self.tf32 or self.no_tf32:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")


def holds(name: str, *, make: bool = True) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a verb: while it runs, no other process can write to the folder of its argument `name`.

    Of several processes of one run, the first holds the folder.  make: hold a missing folder too, by making it.
    """

    def decorated(verb: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(verb)
        def holding(*arguments: P.args, **options: P.kwargs) -> None:
            folder = inspect.signature(verb).bind(*arguments, **options).arguments[name]
            if os.environ.get("RANK", "0") != "0" or not (make or Path(folder).is_dir()):
                return verb(*arguments, **options)
            with locked(folder):
                return verb(*arguments, **options)

        return holding

    return decorated


@dataclass(frozen=True)
class PlanChoice:
    """Choose the depths to run. Without `--dynamic`, `--plan`, `--budget` or `--router`: the full model.

    Args:
        dynamic: Run a plan: the given plan, or a plan for `--budget` (default: 0.6).
        budget: Share of full depth's time. The plan is searched on the model's stored table.
        plan: A plan file.
        router: A router that needs no calibration, with its settings: "ramp:3" rises evenly from depth 3 to full depth.
            One of {routers}.
    """

    dynamic: bool = False
    budget: float | None = None
    plan: Path | None = None
    router: str | None = None


@dataclass(frozen=True)
class StepChoice:
    """Choose the step count with the plan, for a time or a quality, in place of a budget at given steps."""

    latency_budget: float | None = None
    """Share of the reference time, above 0 and at most 1. Find the least predicted distance in it."""
    target_fd: float | None = None
    """Predicted Fréchet distance. Reach it in the least time."""
    reference_steps: int | None = None
    """Steps of full depth whose time is the reference (default: the steps that the table was measured at)."""


_trusted: list[str] = []
"""Modules that this command line trusts."""


def take_trust(arguments: list[str]) -> None:
    """Take every `--trust MODULE` out of the command line; `checked` imports them. Raises InputError: it names none."""
    _trusted.clear()
    while "--trust" in arguments:
        at = arguments.index("--trust")
        if at + 1 == len(arguments) or arguments[at + 1].startswith("-"):
            raise InputError("--trust: names no module; expected a module or a Python file, such as my_dit.py")
        _trusted.append(arguments[at + 1])
        del arguments[at : at + 2]


def checked(verb: Callable[..., None]) -> Callable[..., None]:
    """Check a verb's flags before it runs: numbers by `dyndit.bounds`, and that its inputs are there.

    No library is loaded for that, so a wrong path is refused at once. Trusted modules are imported after the checks, as
    `python -m` would import them from here.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        values: dict[str, Any] = {}
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            values = vars(value) | values if is_dataclass(value) else values | {name: value}  # MODEL, not --model CARD
        bounds.check(**values)
        if not getattr(given.arguments.get("published"), "model", ""):  # refused for that, whatever it is
            values.pop("ckpt", None)
        if _is_on_the_hub(values.get("vae")):
            del values["vae"]
        bounds.check_inputs(values)
        if values.get("recipe") is not None:
            from dyndit.cli.recipes import check_name

            check_name(str(values["recipe"]))
        for name in ("model", "source", "path"):
            _check_model(values.get(name), verb.__name__)
        with loading():
            importlib.import_module("dyndit.models.dynamic")
        if _trusted:
            from dyndit.models.registry import trust

            sys.path.insert(0, str(Path.cwd()))
            trust(*_trusted)
        verb(*args, **kwargs)

    return run


def loading() -> "AbstractContextManager[Advance]":
    """Name the stage in which libraries are imported: seconds, before anything else can be said."""
    from dyndit.progress import progress_bar

    return progress_bar("loading PyTorch and diffusers")


def flags_of(verb: Callable[..., object]) -> set[str]:
    """Return every flag of a verb, further names included: {"--out", "--num-images", "--num-fid-samples", ...}."""
    hints, found = get_type_hints(inspect.unwrap(verb), include_extras=True), set()
    parameters = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    for name, hint in ((parameter.name, hints[parameter.name]) for parameter in parameters):
        inner, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(inner):
            found |= {field.name for field in fields(inner)}
            continue
        found.add(next((mark.name for mark in marks if getattr(mark, "name", None)), name))
        found |= {alias.removeprefix("--") for mark in marks for alias in getattr(mark, "aliases", None) or ()}
    return {f"--{name.replace('_', '-')}" for name in found}


def _is_on_the_hub(vae: object) -> bool:
    """Tell if an autoencoder is named by a hub id, or as one of the published ones, and not by a path."""
    from dyndit.storage.hub_id import parse

    return vae is not None and (str(vae) in ("mse", "ema") or parse(str(vae)) is not None)


def _check_model(model: object, verb: str) -> None:
    """Refuse a model that is no path, no name and no hub id."""
    from dyndit.storage.hub_id import parse

    if isinstance(model, Path):
        if not model.is_dir():
            raise InputError(
                f"{model}: the table is written into the model's folder; expected a local model folder, which "
                f"`dyndit distill` or `dyndit convert` makes{did_you_mean(model.name, bounds.beside_of(model))}"
            )
        return
    path, text = Path(str(model)), str(model)
    if not model or text == "digits" or text.startswith("random:") or path.exists():
        return
    if text.startswith("DiT-"):
        if verb not in ("train", "info"):  # which take cards, and know them
            raise InputError(f"{text}: a card names no weights; expected a path, or `dyndit sample --model {text}`")
        return
    expected = "expected a model folder, a DiT .pt, 'digits' or a hub id (org/name)"
    wanted, near = parse(text), bounds.beside_of(path)
    if wanted is None:
        raise CheckpointError(f"{text}: no such file or folder; {expected}{did_you_mean(path.name, [*near, 'digits'])}")
    if near and wanted.revision is None:  # a folder of the organisation's name is here: a path was meant
        meant = did_you_mean(path.name, near)
        raise CheckpointError(f"{text}: no such file or folder{meant}; {text}@main is the hub's model of that name")


@dataclass(frozen=True)
class Reading:
    """How pictures are read."""

    resize_method: str = "bicubic"
    """How pictures come to the size: bicubic (crop the centre, then resize once, antialiased), adm (ADM's halving
    with a box filter, bicubic, centre crop) or clean-fid (as bicubic, on floats)."""
    skip_damaged: bool = False
    """Leave damaged pictures out, counted and listed; otherwise they are refused before anything is done."""


READING = Reading()


def say(lines: "Iterable[str]") -> None:
    """Print lines to standard error."""
    for line in lines:
        print(line, file=sys.stderr)


FULL_DEPTH = PlanChoice()
AS_GIVEN = StepChoice()
NOT_PUBLISHED = PublishedSampling()


def chosen_plan(
    dynamic: "DynamicDepth", model: str, depth: PlanChoice, solver: str, steps: int, cfg_scale: float
) -> "DepthPlan | None":
    """Return the plan that the flags ask for, not yet bound to the model. None is the full model."""
    from dyndit.plans.plan import DepthPlan
    from dyndit.plans.schedules import parse_router
    from dyndit.sampling.budget import plan_on_table
    from dyndit.sampling.loop import full_plan

    given = [flag for flag in ("plan", "budget", "router") if getattr(depth, flag) is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if depth.router is not None:
        return parse_router(depth.router, dynamic.process)(full_plan(dynamic, solver, steps, cfg_scale), dynamic.depths)
    if depth.plan is not None:
        return DepthPlan.load(depth.plan)
    if depth.budget is None and not depth.dynamic:
        return None
    budget = 0.6 if depth.budget is None else depth.budget
    return plan_on_table(dynamic, stored_table(model), budget=budget, solver=solver, num_steps=steps)


def stored_table(model: str) -> "ShiftTable":
    """Load the shift table in a model's folder. Raises InputError: there is no table."""
    from dyndit.plans.table import ShiftTable
    from dyndit.storage import load as checkpoints

    path = Path(model) / checkpoints.TABLE
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the table that `dyndit calibrate {model}` writes")
    return ShiftTable.load(path)


def decoder_of(dynamic: "DynamicDepth", model: str | Path, vae: Path | None, device: str) -> "ModelMixin | None":
    """Load the autoencoder of a model's latents; print if the model records another. A model of pictures gives None.

    Raises InputError: the model makes latents, and no autoencoder is given or lies beside it.
    """
    from dyndit.storage.autoencoder import differs, open_autoencoder

    decoder: Any = None if dynamic.pixel_space else open_autoencoder(vae, dynamic, model)
    if decoder is None:
        return None
    for note in differs(decoder, dynamic):
        print(note)
    decoder.to(device)
    return decoder


def goal_of(choice: StepChoice, steps: int | None, **others: Any) -> "Goal | None":
    """Return the goal to choose steps for. None: the steps are given. others: flags that exclude a goal."""
    from dyndit.plans.step_counts import LatencyBudget, TargetFD

    wanted = {"latency-budget": choice.latency_budget, "target-fd": choice.target_fd}
    asked = [flag for flag, value in wanted.items() if value is not None]
    given = [flag for flag, value in (wanted | others).items() if value is not None]
    if not asked:
        if choice.reference_steps is not None:
            raise InputError(
                f"--reference-steps {choice.reference_steps}: expected --latency-budget or --target-fd with it"
            )
        return None
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: both given; expected one of them")
    if steps is not None:
        raise InputError(f"--steps {steps}: --{asked[0]} chooses the step count; expected one of them")
    if choice.target_fd is not None:
        return TargetFD(choice.target_fd, choice.reference_steps)
    return LatencyBudget(choice.latency_budget or 0.0, choice.reference_steps)
