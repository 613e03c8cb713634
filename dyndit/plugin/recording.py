"""Recording the calls of a pipeline's transformer: the very states, prompts and branches that exits will meet.

with dyndit.record_calls(pipe, "calls"):
    pipe(prompts, num_inference_steps=20, generator=generators)      # the pipeline's own call, as often as wished
exits = dyndit.distill_exits(pipe, "calls", out="exits")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyndit.plugin.adapters import adapt
from dyndit.plugin.hooks import Target, transformer_of, watching
from dyndit.training.recorded import Recording

HOOK = "dyndit_recording"


@contextmanager
def record_calls(target: Target, out: str | Path) -> Iterator[Recording]:
    """Record every call of a pipeline's transformer in the folder `out`, while open; add to what is recorded there.

    target: the pipeline, or its transformer. Nothing about it changes, and no hook is left behind.

    Raises:
        InputError: no adapter serves the transformer, it is being recorded already, or `out` holds other things.
            From within a call: the call passes what no adapter takes, or no file could hold.
    """
    transformer = transformer_of(target)
    adapter = adapt(transformer)
    recording = Recording.open(Path(out), adapter)

    def on_call(*args: object, **kwargs: object) -> None:
        recording.write(adapter.read(*args, **kwargs))

    with watching(transformer, HOOK, on_call):
        yield recording
