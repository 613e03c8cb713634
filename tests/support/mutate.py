"""Change one operator or constant at a time, and see whether the tests of the module notice.

    nice -n 19 python tests/support/mutate.py --only stats --num 40 --seed 0

The package is copied to a temporary folder. Libraries are loaded once; a forked child makes each change and runs the
tests of the changed module until the first failure. Prints the share that was noticed, and every change that was not.
What was found is kept in build/mutation, a file per group; `--page FILE` writes a page of all that is kept there.
"""

import argparse
import ast
import contextlib
import datetime
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "build" / "mutation"

TARGETS = {
    "plans": (
        [f"dyndit/plans/{name}.py" for name in ("plan", "step", "schedules")],
        [f"unit/plans/test_{name}.py" for name in ("step", "schedules", "at", "plan", "guides")],
    ),
    "search": (
        [f"dyndit/plans/{name}.py" for name in ("search", "predictor", "refined")],
        [f"unit/{name}.py" for name in ("plans/test_refined", "plans/test_search", "models/test_forecasts")],
    ),
    "storage": (
        ["dyndit/storage/reading.py", "dyndit/storage/native.py"],
        [
            *("unit/training/test_checkpoints.py", "unit/storage/test_processes.py", "unit/storage/test_dialects.py"),
            *("unit/models/test_own.py", "reliability/test_strangers.py", "unit/storage/test_formats.py"),
            "reliability/test_damaged_files.py",
        ],
    ),
    "files": (["dyndit/files.py", "dyndit/locks.py"], ["unit/test_files.py", "reliability/test_folders.py"]),
    "stats": (["dyndit/stats.py", "dyndit/rounds.py"], ["unit/test_stats.py", "unit/test_rounds.py"]),
    "metrics": (
        [f"analysis/metrics/{name}.py" for name in ("infinity", "kid", "manifold", "memorisation", "paired")],
        [f"unit/analysis/test_{name}.py" for name in ("kid", "infinity", "memorisation", "paired", "quality")],
    ),
    "seals": (
        ["dyndit/seals.py", "dyndit/sealed_csv.py"],
        ["unit/test_sealed_csv.py", "reliability/test_damaged_files.py"],
    ),
    "bounds": (
        ["dyndit/bounds.py", "dyndit/untrusted.py"],
        [f"reliability/test_{n}.py" for n in ("bounds", "strangers")],
    ),
}
"""Modules to change; and the tests that should notice, in the order in which they run."""

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Change(ast.NodeTransformer):
    """Make the change of number `wanted`, or count all changes if it is -1."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.count, self.line, self.made = wanted, 0, 0, ""

    def _due(self, node: ast.AST, what: str) -> bool:
        due = self.count == self.wanted
        self.count += 1
        if due:
            self.line, self.made = node.lineno, what
        return due

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for k, op in enumerate(node.ops):
            if self._due(node, f"{type(op).__name__} -> {SWAPS[type(op)].__name__}"):
                node.ops[k] = SWAPS[type(op)]()
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if (kind := type(node.op)) in SWAPS and self._due(node, f"{kind.__name__} -> {SWAPS[kind].__name__}"):
            node.op = SWAPS[kind]()
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        if self._due(node, f"{type(node.op).__name__} -> {SWAPS[type(node.op)].__name__}"):
            node.op = SWAPS[type(node.op)]()
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) in (int, float) and self._due(node, f"{node.value} -> {node.value + 1}"):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        if isinstance(node.value, bool) and self._due(node, f"{node.value} -> {not node.value}"):
            return ast.copy_location(ast.Constant(not node.value), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node  # the wording of messages

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]  # no annotations, no default values
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if self._due(node, "raise -> pass"):
            return ast.copy_location(ast.Pass(), node)
        return node


class Tree:
    """A copy of the package and its tests, in which modules are changed."""

    def __init__(self, place: Path) -> None:
        self.place, self.root, self.libraries = place, place / "tree", place / "libraries"
        self.most_naps = 0  # no limit yet
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
        for name in ("analysis", "recipes"):
            if not (self.root / "dyndit" / name).exists():
                (self.root / "dyndit" / name).symlink_to(f"../{name}")

    def changes(self, module: str) -> list[tuple[str, int]]:
        """Return all possible changes of a module."""
        (counter := Change()).visit(ast.parse((self.root / module).read_text()))
        return [(module, number) for number in range(counter.count)]

    @contextlib.contextmanager
    def changed(self, module: str, number: int) -> Iterator[str]:
        """Make a change for the block; yield what it is."""
        path, change = self.root / module, Change(number)
        text = path.read_text()
        path.write_text(ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(text)))))
        try:
            yield f"{module}:{change.line}: {change.made}: `{text.splitlines()[change.line - 1].strip()}`"
        finally:
            path.write_text(text)

    def passes(self, tests: list[str], seconds: float) -> bool:
        """Run tests in a child; whether all pass, within so many seconds of the processor.

        The first child is slow: the libraries that it needs are then loaded here, for all later children. A child that
        takes three times as long as the group's first one, which ran the unchanged modules, waits for ever.
        """
        if (child := os.fork()) == 0:
            self._test([f"tests/{name}" for name in tests], round(seconds))
        done, status, naps = 0, 0, 0
        while not done and naps < (self.most_naps or math.inf):  # a pause of both processes takes no nap
            time.sleep(0.05)
            naps += 1
            done, status = os.waitpid(child, os.WNOHANG)
        self.most_naps = self.most_naps or 3 * naps + 200
        with contextlib.suppress(ProcessLookupError):  # with all that it has started
            os.killpg(child, signal.SIGKILL)
        if not done:
            os.waitpid(child, 0)
        shutil.rmtree(self.place / "tests", ignore_errors=True)
        if not self.libraries.exists():
            return False
        for name in set(self.libraries.read_text().split()) - set(sys.modules):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return bool(done) and status == 0

    def _test(self, tests: list[str], seconds: int) -> None:
        import pytest

        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (used := round(time.process_time()) + seconds, used))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the child ends
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        sys.dont_write_bytecode = self.libraries.exists()  # else of modules as they are, for all later children
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={self.place / 'tests'}"]
        failed = pytest.main([*options, *tests]) != 0
        if not self.libraries.exists():
            names = (name for name in sys.modules if not name.startswith(("dyndit", "support", "tests", "test_")))
            self.libraries.write_text("\n".join(sorted(names)))
        os._exit(int(failed))


def of_group(tree: Tree, group: str, num: int, seed: int, seconds: float, only: list[list] | None) -> dict:
    """Try changes of a group; what was found.  only: the changes to try, of an earlier call; None: a random choice."""
    modules, tests = TARGETS[group]
    tree.most_naps = 0
    if not tree.passes(tests, seconds):
        sys.exit(f"{group}: its tests fail without a change")
    changes = [change for module in modules for change in tree.changes(module)]
    picked = only or random.Random(seed).sample(changes, min(num, len(changes)))
    survivors = []
    for number, (module, change) in enumerate(picked):
        with tree.changed(module, change) as what:
            noticed = not tree.passes(tests, seconds)
        survivors += [] if noticed else [(module, change, what)]
        print(f"{group} {number + 1}/{len(picked)}: {'noticed' if noticed else 'NOT NOTICED'}: {what}", flush=True)
    return {
        "group": group, "tried": min(num, len(changes)), "possible": len(changes), "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "modules": _hashes(tree.root, modules),
        "survivors": sorted(survivors),
    }  # fmt: skip


def _hashes(root: Path, modules: list[str]) -> dict[str, str]:
    return {module: hashlib.sha256((root / module).read_bytes()).hexdigest()[:16] for module in modules}


def _share(found: dict) -> str:
    noticed = found["tried"] - len(found["survivors"])
    return f"{noticed} of {found['tried']} noticed, {noticed / found['tried']:.0%} (of {found['possible']} possible)"


PAGE = """# Mutation testing

What the tests notice. One operator or constant of a module is changed at a time: `<` to `<=`, `+` to `-`, `and` to
`or`, 1 to 2, True to False; or a `raise` is left out. Then the tests of the module run. `make mutation` tries a random
choice of changes and writes this page, which nobody edits by hand. The changes that no test noticed are listed. Some of
them change nothing that can be seen, such as the size of the blocks in which a file is read.
"""


def page(all_found: list[dict]) -> str:
    """Return the page's text."""
    lines = [PAGE, "| modules | changes tried | noticed | share | seed | date |", "|---|---|---|---|---|---|"]
    for found in all_found:
        tried, noticed = found["tried"], found["tried"] - len(found["survivors"])
        row = (found["group"], f"{tried} of {found['possible']}", noticed, f"{noticed / tried:.0%}", found["seed"])
        lines.append("| " + " | ".join(map(str, (*row, found["date"]))) + " |")
    for found in all_found:
        modules, tests = TARGETS[found["group"]]
        lines += [f"\n## {found['group'].capitalize()}\n", f"Changed: {_named(modules)}.", f"Run: {_named(tests)}.\n"]
        places = (what.partition(": ") for *_, what in found["survivors"])
        lines += [f"- `{place}`, {change}" for place, _, change in places] or ["Every change was noticed."]
    return "\n".join(lines) + "\n"


def _named(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*TARGETS], help="one group of modules")
    parser.add_argument("--num", type=int, default=40, help="changes a group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="most processor seconds a change")
    parser.add_argument("--again", action="store_true", help="try the changes that were not noticed the last time")
    parser.add_argument("--page", type=Path, help="write a page of what was found, and try nothing")
    asked = parser.parse_args()
    if asked.page:
        kept = {path.stem: json.loads(path.read_text()) for path in FOUND.glob("*.json")}
        asked.page.write_text(page([kept[group] for group in TARGETS if group in kept]))
        return
    import diffusers  # noqa: F401
    import torch

    torch.set_num_threads(1)
    FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Tree(Path(temporary))
        for group in [asked.only] if asked.only else TARGETS:
            tree.libraries.unlink(missing_ok=True)
            path, before = FOUND / f"{group}.json", {}
            if asked.again:
                before = json.loads(path.read_text())
                if before["modules"] != _hashes(ROOT, TARGETS[group][0]):
                    sys.exit(f"{group}: its modules were changed since; expected a call without --again")
            only = [change[:2] for change in before.get("survivors", [])] or None
            if asked.again and not only:
                continue
            found = of_group(tree, group, asked.num, asked.seed, asked.seconds, only)
            path.write_text(json.dumps(found | {k: before[k] for k in ("tried", "seed") if before}, indent=1))
            print(f"{group}: {_share(json.loads(path.read_text()))}", flush=True)
            print("\n".join(f"  not noticed: {what}" for *_, what in found["survivors"]), flush=True)


if __name__ == "__main__":
    main()
