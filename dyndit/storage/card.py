"""Write the model card of a native folder: README.md, made from the folder's files.

The analysis suite makes the picture of the plans and the table of measured runs; the caller hands them in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dyndit.errors import InputError
from dyndit.files import write_text, written_whole
from dyndit.markdown import plain
from dyndit.models.conditions import ClassLabels, Value
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.identity import tensors_hash
from dyndit.plans.plan import DepthPlan
from dyndit.plans.table import ShiftTable
from dyndit.storage.native import TABLE, plans_in

CARD, PICTURE = "README.md", "plans.png"
MARK = "<!-- Written by dyndit from the files beside it. Without this line dyndit leaves the card alone. -->"
TAGS = ("dyndit", "diffusion-transformer", "dit", "early-exit")


@dataclass(frozen=True)
class CardExtras:
    """Parts of a card that `dyndit.analysis.report.card` makes.

    picture: a PNG of the plans; default: the plans are printed. measured: Markdown, the table of measured runs.
    """

    picture: bytes | None = None
    measured: str = ""


def is_foreign(folder: Path) -> bool:
    """Tell whether the folder holds a card that dyndit did not write."""
    path = folder / CARD
    return path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")


def license_of(folder: Path) -> str | None:
    """Return the licence that a card's front matter names."""
    path = folder / CARD
    if not path.is_file():
        return None
    found = re.match(r"---\n(?:.*\n)*?license: *([\w.+-]+) *\n", path.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None


def write(model: DynamicDepth, folder: Path, *, license: str | None = None, extras: CardExtras | None = None) -> None:
    """Write the card, and beside it the picture of the plans. A card that dyndit did not write is left alone.

    license: for the front matter (default: the existing card's licence). extras: the picture and the measured table.

    Raises:
        InputError: the licence is no identifier.
        CheckpointError: a plan cannot be read.
    """
    if is_foreign(folder):
        return
    license = license or license_of(folder)
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise InputError(f"license {license!r:.40}: expected an identifier such as apache-2.0")
    plans = {path.name: plan for path, plan in plans_in(folder).items()}
    extras = extras or CardExtras()
    if extras.picture is not None:
        with written_whole(folder / PICTURE) as draft:
            draft.write_bytes(extras.picture)
    write_text(folder / CARD, card(model, folder, plans, license, extras))


def card(
    model: DynamicDepth, folder: Path, plans: Mapping[str, DepthPlan], license: str | None, extras: CardExtras
) -> str:
    """Return the card's text.  plans: by file name."""
    labelled = isinstance(model.backbone.condition, ClassLabels)
    kind = "video" if len(model.backbone.sample_shape) == 4 else "image"
    task = f"class-conditional-{kind}-generation" if labelled else f"text-to-{kind}"
    tags = "\n".join(f"- {tag}" for tag in (*TAGS, task))
    named = f"license: {license}\n" if license else ""
    parts = [
        f"---\nlibrary_name: dyndit\n{named}tags:\n{tags}\n---",
        MARK,
        "# A Diffusion Transformer that stops early",
        _backbone(model),
        _exits(model),
        _plans(plans, folder, extras) if plans else "",
        f"## Measured\n\n{extras.measured}" if extras.measured else "",
        _loading(model, plans),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _backbone(model: DynamicDepth) -> str:
    config = model.backbone.config()
    rows = [f"| {name} | {_shortened(value)} |" for name, value in config.items()]
    rows += [
        f"| parameters | {sum(p.numel() for p in model.backbone.parameters()):,} |",
        f"| process | {model.process} |",
        f"| makes | {'pixels in [-1, 1]' if model.pixel_space else 'latents'} |",
        f"| hash | `{model.identity.backbone}` |",
    ]
    return "\n".join(["## Backbone", "", "| | |", "|---|---|", *rows])


def _exits(model: DynamicDepth) -> str:
    if model.exits is None:
        return "## Exits\n\nNone: the model runs at full depth alone."
    layers = ", ".join(map(str, model.exits.layers))
    count = sum(p.numel() for p in model.exits.parameters())
    return (
        f"## Exits\n\n`{model.exits.config.head}` heads after layers {layers} of {model.num_blocks}; {count:,} "
        f"parameters; hash `{tensors_hash(model.exits.state_dict())}`."
    )


def _plans(plans: Mapping[str, DepthPlan], folder: Path, extras: CardExtras) -> str:
    """Show the plans and the figures in their files: predicted on the table's seeds, measured on fresh ones."""
    columns = {
        "predicted_share_of_time": "share of full depth's time, predicted",
        "predicted_fd": "distance, predicted",
        "measured_fd": "distance, measured",
        "measured_fd_full": "full depth, measured",
    }
    head = ["plan", "router", "solver", "steps", "guidance", "budget", "blocks run", *columns.values()]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for name, plan in plans.items():
        budget = "–" if plan.budget is None else f"{plan.budget:g}"
        routed = plan.router + (f" ({plan.note})" if plan.note else "")
        named = [
            f"`{plain(name)}`",
            plain(routed),
            plain(plan.solver),
            str(plan.num_steps),
            f"{plan.cfg_scale:g}",
            budget,
        ]
        figures = [_number(plan.figures.get(column)) for column in columns]
        lines.append([*named, f"{plan.share_of_blocks:.0%}", *figures])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    what = f"Distances are Fréchet distances{_features(folder)}; lower is better."
    printed = "\n\n".join(f"{name}: {plan}" for name, plan in plans.items())
    shown = f"```text\n{printed}\n```" if extras.picture is None else f"![Depth over the sampling steps]({PICTURE})"
    return f"## Plans\n\n{shown}\n\n{table}\n\n{what}"


def _features(folder: Path) -> str:
    if not (folder / TABLE).exists():
        return ""
    table = ShiftTable.load(folder / TABLE)
    features, num = plain(table.extractor), table.num_pictures
    return f" on the features of `{features}`, predicted from {num} pictures per entry of the table"


def _loading(model: DynamicDepth, plans: Mapping[str, DepthPlan]) -> str:
    guided = model.backbone.condition.guided
    drawn = f'solver="{model.process.usual_solver}", num_steps=20, cfg_scale={1.5 if guided else 1}'
    if plans:
        name, plan = next(iter(plans.items()))
        drawn = f'plan=dyndit.DepthPlan.load("{name}"), solver="{plan.solver}", num_steps={plan.num_steps}'
        drawn += f", cfg_scale={plan.cfg_scale:g}"
    result = "pictures" if model.pixel_space else "latents"
    return (
        "## Use\n\n```python\nimport dyndit\n"
        'model = dyndit.load("PATH_OR_HUB_ID")  # this folder, or its id on the hub\n'
        f"{result} = dyndit.sample(model, labels={_asked(model)}, {drawn}).{result}\n```"
    )


def _asked(model: DynamicDepth) -> list[Value]:
    """Return a label or a caption to ask for."""
    try:
        return model.backbone.condition.in_turn(1)
    except InputError:  # a model of captions without prompts of its own
        return ["CAPTION"]


def _shortened(value: object) -> str:
    """Write a value in at most 200 characters."""
    return text if len(text := str(value)) <= 200 else f"{text[:199]}…"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
