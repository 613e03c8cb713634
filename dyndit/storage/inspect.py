"""Say what a path is: what would be loaded, what is ignored, what is missing. `dyndit inspect` prints it.

A kind is a function from a path to a `Description`, or to None if the path is of another kind. Each kind registers
itself with `@kind`, and stands beside the code that reads such files. Models are asked last.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dyndit.errors import InputError


@dataclass(frozen=True)
class Description:
    """What a path is. Every entry of `loaded`, `ignored` and `missing` is a line for people."""

    kind: str
    """For example "published DiT checkpoint" or "depth plan"."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Plain data by name: {"blocks": 28, "width": 1152}."""
    loaded: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Things assumed, and how to say another."""
    problem: str = ""
    """The line with which the rest of the package refuses the path; empty if it is accepted."""

    def lines(self) -> list[str]:
        """Return the description as lines of text."""
        lines = [self.kind, *(f"  {name}: {value}" for name, value in self.facts.items())]
        for title in ("loaded", "ignored", "missing", "notes"):
            lines += [f"{title}: {line}" for line in getattr(self, title)]
        return [*lines, f"refused: {self.problem}"] if self.problem else lines

    def data(self) -> dict[str, object]:
        """Return the description as plain data for JSON."""
        return asdict(self)


Describe = Callable[[Path], Description | None]

KINDS: dict[str, Describe] = {}
"""Every registered kind, by name, in the order of registration."""


def kind(name: str) -> Callable[[Describe], Describe]:
    """Register a function that describes one kind of path. It returns None for paths of other kinds.

    A path of its kind that is damaged gets a `Description` with a `problem`. An `InputError` that it raises is taken
    for one.
    """

    def register(describe: Describe) -> Describe:
        KINDS[name] = describe
        return describe

    return register


def recognised(path: Path) -> Description | None:
    """Describe a path by the first kind that knows it. No kind does: None."""
    for name, describe in KINDS.items():
        try:
            found = describe(path)
        except InputError as error:
            return Description(name, problem=str(error))
        if found is not None:
            return found
    return None
