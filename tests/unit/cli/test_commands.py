"""Every command that the documents and the recipes show is one that the command line takes."""

import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from dyndit.cli import VERBS, main, verbs
from dyndit.cli.recipes import modules

ROOT = Path(__file__).parents[3]
SOURCES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md"), *ROOT.glob("recipes/**/*.py")]
LINE = re.compile(r"^ *(?:(?:srun )?accelerate launch .*-m )?(dyndit (?:.*\\\n)*.*)$", re.M)


def commands() -> list[tuple[str, str]]:
    """(where, command) of every line that begins with "dyndit" or launches it, with the lines it goes on in."""
    found = []
    for source in SOURCES:
        text = source.read_text().replace("\\\\\n", "\\\n")  # in a docstring the backslash is written twice
        for match in LINE.finditer(text):
            command = re.sub(r"\\\n *", "", match[1]).replace("$seed", "0")
            if command.split()[1] in VERBS and "..." not in command:
                found.append((str(source.relative_to(ROOT)), command))
    return found


def test_the_documents_show_commands() -> None:
    assert len(commands()) > 40
    assert {command.split()[1] for _, command in commands()} == VERBS.keys()


@pytest.mark.parametrize(("where", "command"), commands())
def test_the_command_line_takes_it(where: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    noting = {
        name: functools.wraps(verb)(lambda *_, name=name, **__: taken.append(name)) for name, verb in verbs([]).items()
    }
    monkeypatch.setattr("dyndit.cli.verbs", lambda _: noting)
    main(shlex.split(command, comments=True)[1:])
    verb, *more = command.split()[1:]
    assert taken == [verb]
    if verb in ("train", "distill", "compare") and not more[0].startswith("--"):
        assert more[0] in modules()


def test_the_documents_run_modules_that_are_there() -> None:
    texts = [source.read_text() for source in (*SOURCES, *ROOT.glob("dyndit/assets/*.md"))]
    modules = {module for text in texts for module in re.findall(r"python -m (dyndit[\w.]*)", text)}
    assert len(modules) >= 3
    assert all(importlib.util.find_spec(module) for module in modules)
