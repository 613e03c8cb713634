"""Bounds of every number that a flag or a Python argument sets, by name.

The command line checks a verb's flags before the verb runs, and `@checked` checks a function's arguments before its
body runs. So nothing is written, and no library is imported, for a value that cannot be meant. A bound that depends on
the model or on the data is checked where the model and the data are known.
"""

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from dyndit.errors import InputError, did_you_mean

F = TypeVar("F", bound=Callable[..., object])


def is_number(value: object) -> bool:
    """Tell if a value is a finite number that a float can hold. Truth values are no numbers."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Bound:
    """Numbers from `low` to `high`, both included.  whole: integers alone. above: `low` itself is excluded."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def holds(self, value: Any) -> bool:
        """Tell if a value is inside."""
        if not is_number(value) or (self.whole and not isinstance(value, numbers.Integral)):
            return False
        number: Any = value
        return self.low <= number <= self.high and not (self.above and number == self.low)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        return f"{low} and at most {self.high}" + (", a whole number" if self.whole else "")


def _whole(low: int, high: int) -> Bound:
    return Bound(low, high, whole=True)


MOST_STEPS = 1000
"""Most steps of a sampling: the timesteps of a process."""
_COUNT, _SEED = _whole(1, 10**6), _whole(0, 2**63 - 1)

BOUNDS: dict[str, Bound] = {
    "accumulation": _COUNT,
    "batch_size": _COUNT,
    "budget": Bound(0, 1, above=True),
    "cfg_scale": Bound(-1000, 1000),
    "checkpoint_every": _COUNT,
    "epochs": _COUNT,
    "first_index": _whole(0, 10**9),
    "forecast_ages": _whole(0, MOST_STEPS),
    "guided_channels": _whole(0, 10**6),
    "image_size": _whole(1, 1 << 16),
    "latency_budget": Bound(0, 1, above=True),
    "layers": _whole(0, 10**6),
    "learning_rate": Bound(0, 1e300),
    "log_every": _COUNT,
    "margin": Bound(0, 100),
    "max_gib": Bound(0, 1 << 20, above=True),
    "max_rounds": _COUNT,
    "num_bands": _whole(1, MOST_STEPS),
    "num_classes": _whole(1, 10**6),
    "num_depths": _whole(1, 10**4),
    "num_heads": _whole(1, 10**6),
    "num_images": _whole(1, 10**9),
    "num_pictures": _whole(1, 10**9),
    "num_steps": _whole(1, MOST_STEPS),
    "num_workers": _whole(0, 1000),
    "port": _whole(0, 65535),
    "reference_count": _whole(2, 10**9),
    "reference_steps": _whole(1, MOST_STEPS),
    "refinements": _whole(0, 1000),
    "resize_and_crop": _whole(1, 1 << 16),
    "rounds": _COUNT,
    "sample_every": _whole(0, 10**9),
    "seed": _SEED,
    "shape": _COUNT,
    "step_grid": _whole(1, MOST_STEPS),
    "steps": _whole(1, 10**9),
    "table_steps": _whole(1, MOST_STEPS),
    "target_fd": Bound(0, 1e12, above=True),
    "tflops": Bound(0, 1e9, above=True),
    "until": Bound(0, 100),
}
"""The bound of each number. A tuple's numbers are checked one by one; None is no number and passes."""


def check(**values: object) -> None:
    """Check values by the bounds of their names. Names without a bound pass.

    Raises:
        InputError: the first value out of bounds, named as the flag.
    """
    for name, value in values.items():
        if (bound := BOUNDS.get(name)) is None or value is None:
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            if not bound.holds(each):
                shown = f"{each:g}" if isinstance(each, float) else str(each) if is_number(each) else repr(each)
                raise InputError(f"--{name.replace('_', '-')} {shown:.40}: expected {bound}")


def checked(function: F) -> F:
    """Check the arguments of a function by `BOUNDS` before its body runs."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> object:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            is_more = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            check(**(value if is_more else {name: value}))
        return function(*args, **kwargs)

    return wrapper  # pyright: ignore[reportReturnType]  it takes what the function takes


INPUTS = (
    "ckpt", "data", "exits", "extractor_weights", "file", "full", "held_out", "lpips_weights", "plan", "reference",
    "runs", "samples", "self_check", "sets", "table", "text_encoder", "train", "vae", "verify",
)  # fmt: skip
"""Flags that name files or folders to read."""
NAMES = ("", "digits", "captioned-digits", "moving-digits")
"""Names that stand for a data set in place of a path: those of `training.data.PACKAGED`, and none."""


def check_inputs(values: Mapping[str, Any]) -> None:
    """Check that the files and folders which flags name are there, before any library is loaded.

    Raises:
        InputError: one is missing, or may not be read.
    """
    for name in INPUTS:
        value = values.get(name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is None or isinstance(each, bool) or str(each) in NAMES or str(each).startswith("random:"):
                continue
            path = Path(str(each))
            if not path.exists():
                beside = path.parent.iterdir() if set(path.name) & set("*?[") and path.parent.is_dir() else ()
                if any(fnmatch(found.name, path.name) for found in beside):  # a pattern, such as train-*.tar
                    continue
                meant = did_you_mean(path.name, [*beside_of(path), *(NAMES if name in ("data", "reference") else ())])
                raise InputError(f"{_flag(name)}{each!s:.200}: no such file or folder; expected a path to read{meant}")
            if not os.access(path, os.R_OK):
                raise InputError(f"{_flag(name)}{each!s:.200}: may not be read; expected a file or folder to read")


def beside_of(path: Path) -> list[str]:
    """Return the names in the folder that a missing path would lie in; none if they cannot be listed."""
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def _flag(name: str) -> str:
    return "" if name in ("samples", "sets", "runs", "file") else f"--{name.replace('_', '-')} "
