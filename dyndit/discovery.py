"""Find the classes that the files of a package define, so that a new file needs no list."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def subclasses_in(package: str, path: Iterable[str], base: type[T]) -> list[type[T]]:
    """Import every file of a package and return its direct and indirect subclasses of `base`.

    package, path: `__name__` and `__path__` of the package.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
    return [kind for kind in _subclasses(base) if kind.__module__.startswith(f"{package}.") and kind is not base]


def _subclasses(base: type[T]) -> Iterator[type[T]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)
