"""Imports point one way: files, stats, process -> models -> ... -> cli. Lazy imports count as any others.

A layer may import the layers above it in `LAYERS`, and itself. Within a layer modules form no circle.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

LAYERS = (
    "errors",
    "floor",  # what knows nothing of models: files, stats, process, ...
    "models",
    "plans",
    "sampling",
    "training",
    "calibration",
    "storage",
    "plugin",
    "analysis.metrics",
    "analysis.report",
    "analysis.compare",
    "recipes",
    "demo",
    "cli",
)
FLOOR = (
    "assets", "bounds", "clock", "discovery", "files", "limits", "locks", "manifest", "markdown", "pictures", "process",
    "progress", "rounds", "runtime", "sealed_csv", "seals", "stats", "untrusted",
)  # fmt: skip
ENTRIES = ("", "__main__")
"""The package itself and `python -m dyndit` reach everything: their names load on first use."""

MOST_LINES = 400


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `dyndit`: "models.dit" -> dyndit/models/dit.py."""
    found = {}
    for top, prefix in (("dyndit", ()), ("analysis", ("analysis",)), ("recipes", ("recipes",))):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT / top).with_suffix("").parts)
            if path.resolve().is_relative_to(ROOT / top):
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer(module: str) -> str | None:
    """The layer that a module is in; None for entries, which are above all layers."""
    if module in ENTRIES:
        return None
    parts = module.split(".")
    if parts[0] == "analysis":
        return ".".join(parts[:2]) if len(parts) > 1 else "analysis.compare"
    return "floor" if parts[0] in FLOOR else parts[0]


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """The modules of this package that a module imports, anywhere in its text, and whether at its top level.

    `if TYPE_CHECKING` counts: a type is knowledge too.
    """
    tree = ast.parse(MODULES[module].read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import; expected the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "dyndit" or name.startswith("dyndit."):
                inner = name.removeprefix("dyndit").removeprefix(".")
                while inner not in MODULES:  # a name within a module
                    inner = inner.rpartition(".")[0]
                yield inner, id(node) in top


def against_the_order() -> dict[str, set[str]]:
    """Imports of a later layer, by importing module."""
    found: dict[str, set[str]] = {}
    for module in MODULES:
        mine = layer(module)
        for other, _ in imports(module):
            theirs = layer(other)
            if mine is not None and other != module and (theirs is None or LAYERS.index(theirs) > LAYERS.index(mine)):
                found.setdefault(module, set()).add(other)
    return found


def test_every_module_is_in_a_layer() -> None:
    for module in MODULES:
        assert layer(module) in (None, *LAYERS), module


def test_imports_point_one_way() -> None:
    assert not against_the_order()


def test_no_circles() -> None:
    """Following imports never comes back: within layers as well as across."""
    graph = {m: {other for other, _ in imports(m)} - {m} for m in MODULES if m not in ENTRIES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done or module not in graph:
            return
        for other in sorted(graph[module]):
            visit(other, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_files_are_short() -> None:
    """No file above 400 lines but those that docs/architecture.md names with a reason."""
    page = ROOT / "docs" / "architecture.md"
    named = page.read_text() if page.exists() else ""
    long = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in MODULES.values()}
    assert not {file: lines for file, lines in long.items() if lines > MOST_LINES and f"`{file}`" not in named}


def test_every_package_is_installed() -> None:
    """pyproject lists the packages by hand, as two of them live outside of `dyndit/`."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {m for m, path in MODULES.items() if path.name == "__init__.py"}
    assert {f"dyndit.{name}" if name else "dyndit" for name in packages} == set(listed)
