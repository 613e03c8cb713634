"""Distil exits for a transformer of diffusers, in place."""

from pathlib import Path

from accelerate import PartialState

from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import Exits
from dyndit.plugin.adapters import Adapter, adapt
from dyndit.plugin.hooks import Target, transformer_of
from dyndit.storage import load as checkpoints
from dyndit.training.distill import Distill
from dyndit.training.recorded import RecordedCalls


def distill_exits(
    target: Target,
    calls: RecordedCalls | str | Path,
    recipe: Distill | None = None,
    out: str | Path = "exits",
    *,
    adapter: Adapter | None = None,
) -> Exits:
    """Train exits for a transformer of diffusers, in place, on calls that `record_calls` recorded.

        exits = dyndit.distill_exits(pipe, "runs/calls", dyndit.Distill(), out="runs/exits")
        handle = dyndit.apply_dyndit(pipe, exits)

    target: the pipeline or its transformer; its weights do not change.
    calls: the folder of recorded calls, or what `record_calls` yields, opened as `RecordedCalls`.
    recipe: exits, steps and learning rate. None: `Distill()`.
    out: the folder for checkpoints and the log. A stopped run resumes there. At the end it holds `exits.safetensors`,
    bound to the backbone.
    adapter: see `apply_dyndit`.

    -> the exits, in eval mode.

    Raises:
        InputError: no adapter serves the transformer, or the calls belong to another transformer.
    """
    model = DynamicDepth(adapt(transformer_of(target), adapter), pixel_space=False)
    calls = calls if isinstance(calls, RecordedCalls) else RecordedCalls(calls)
    dynamic, _ = (recipe or Distill()).run(model, calls, Path(out))
    assert dynamic.exits is not None  # `Distill` trained them
    if PartialState().is_main_process:
        checkpoints.save_exits(dynamic.exits, Path(out) / checkpoints.EXITS, model.identity.backbone)
    return dynamic.exits
