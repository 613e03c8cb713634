"""Change one operator or constant at a time, and see whether the tests of the module notice.

    nice -n 19 python tests/support/mutate.py --only stats --num 40 --seed 0

The package is copied to a temporary folder. Libraries are loaded once; a forked child tries each change and runs the
tests of the changed module until the first failure. Prints the share that was noticed, and every change that was not.
"""

import argparse
import ast
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TARGETS = {
    "plans": (
        ["dyndit/plans/plan.py", "dyndit/plans/step.py"],
        ["tests/unit/plans/test_plan.py", "tests/unit/plans/test_step.py"],
    ),
    "search": (["dyndit/plans/search.py"], ["tests/unit/plans/test_search.py"]),
    "storage": (
        ["dyndit/storage/reading.py", "dyndit/storage/native.py"],
        ["tests/reliability/test_damaged_files.py", "tests/unit/storage/test_formats.py"],
    ),
    "files": (["dyndit/files.py"], ["tests/unit/test_files.py"]),
    "stats": (["dyndit/stats.py"], ["tests/unit/test_stats.py"]),
    "metrics": (
        ["analysis/metrics/kid.py", "analysis/metrics/infinity.py", "analysis/metrics/memorisation.py"],
        [f"tests/unit/analysis/test_{name}.py" for name in ("kid", "infinity", "memorisation")],
    ),
    "seals": (
        ["dyndit/seals.py", "dyndit/bounds.py"],
        ["tests/reliability/test_damaged_files.py", "tests/reliability/test_bounds.py"],
    ),
}
"""Modules to change, and the tests that should notice."""

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Change(ast.NodeTransformer):
    """Make the change of number `wanted`, or count all changes if it is -1."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.count, self.made = wanted, 0, ""

    def _due(self, node: ast.AST, what: str) -> bool:
        due = self.count == self.wanted
        self.count += 1
        if due:
            self.made = f"line {node.lineno}: {what}"
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


def noticed(tree: Path, tests: list[str], seconds: int) -> bool:
    """Run the tests in a child; whether one fails, or takes too long."""
    if (child := os.fork()) == 0:
        import pytest

        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - until the child ends
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]) != 0))
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*TARGETS], help="one group of modules")
    parser.add_argument("--num", type=int, default=40, help="changes a group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=120, help="most seconds a change")
    asked = parser.parse_args()
    import accelerate  # noqa: F401 - loaded once for all children
    import diffusers  # noqa: F401
    import hypothesis  # noqa: F401
    import pandas  # noqa: F401
    import torch
    import torch_fidelity  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        left = shutil.ignore_patterns(".git", "build", ".venv", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=left, symlinks=True)
        for name, link in (("analysis", "../analysis"), ("recipes", "../recipes")):
            if not (tree / "dyndit" / name).exists():
                (tree / "dyndit" / name).symlink_to(link)
        for group in [asked.only] if asked.only else TARGETS:
            modules, tests = TARGETS[group]
            if noticed(tree, tests, 20 * asked.seconds):
                sys.exit(f"{group}: its tests fail without a change")
            trees = {module: (tree / module).read_text() for module in modules}
            changes = []
            for module, text in trees.items():
                counter = Change()
                counter.visit(ast.parse(text))
                changes += [(module, k) for k in range(counter.count)]
            picked = random.Random(asked.seed).sample(changes, min(asked.num, len(changes)))
            survivors = []
            for module, k in picked:
                change = Change(k)
                changed = ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(trees[module]))))
                (tree / module).write_text(changed)
                if not noticed(tree, tests, asked.seconds):
                    survivors.append(f"{module} {change.made}")
                (tree / module).write_text(trees[module])
            killed = len(picked) - len(survivors)
            print(f"{group}: {killed} of {len(picked)} noticed (of {len(changes)} possible changes)", flush=True)
            print("\n".join(f"  not noticed: {line}" for line in sorted(survivors)), flush=True)


if __name__ == "__main__":
    main()
