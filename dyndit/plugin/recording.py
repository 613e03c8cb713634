"""Record the calls of a pipeline's transformer: the same states, prompts and branches that exits will meet.

with dyndit.record_calls(pipe, "calls"):
    pipe(prompts, num_inference_steps=20, generator=generators)      # the pipeline's own call, as often as wished
exits = dyndit.distill_exits(pipe, "calls", out="exits")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyndit.plugin.adapters import Adapter, adapt
from dyndit.plugin.hooks import Target, transformer_of, watching
from dyndit.training.recorded import Recording

HOOK = "dyndit_recording"


@contextmanager
def record_calls(target: Target, out: str | Path, *, adapter: Adapter | None = None) -> Iterator[Recording]:
    """Record every call of a pipeline's transformer while the context is open.

        with dyndit.record_calls(pipe, "runs/calls"):
            pipe(class_labels=[207, 360], num_inference_steps=20)

    target: the pipeline, or its transformer. It does not change, and no hook remains.
    out: the folder for the calls. Calls that it holds already stay; new ones are added.
    adapter: see `apply_dyndit`.

    Raises:
        InputError: no adapter serves the transformer, it is recorded already, or `out` holds other files. Within a
            call: an argument that no adapter takes or that no file can hold.
    """
    transformer = transformer_of(target)
    adapter = adapt(transformer, adapter)
    recording = Recording.open(Path(out), adapter)

    def on_call(*args: Any, **kwargs: Any) -> None:
        recording.write(adapter.read(*args, **kwargs))

    with watching(transformer, HOOK, on_call):
        yield recording
