"""A model of one's own, as docs/how-to/my-own-model.md wraps it: on the command line, in files, in lines counted."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dyndit
from dyndit.cli import main
from support.fences import ROOT, fences
from support.own import OWN_MODEL, forget, forgotten, write_own

RECIPE = """
import dyndit
from my_dit import MyDiT

fit = dyndit.FitConfig(steps=2, batch_size=8)
train = dyndit.Train(MyDiT.architecture(depth=4, width=16), fit, "digits")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's my_dit.py in it."""
    monkeypatch.chdir(tmp_path)
    with forgotten():
        write_own(tmp_path)
        yield tmp_path


def run(command: str) -> None:
    """Run a command as a process of its own would: nothing is registered before it."""
    forget()
    main(command.split())


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that refuses a command."""
    with pytest.raises(SystemExit) as stopped:
        run(command)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def saved(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    from my_dit import MyDiT

    dyndit.DynamicDepth(MyDiT(depth=4, width=16)).save_pretrained(folder / "mine")


def test_every_verb_takes_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "recipe.py").write_text(RECIPE)
    trust = "--trust my_dit.py"
    run(f"train recipe.py --out trained {trust}")
    run(f"distill finetune_exits --model trained --data digits --out exits --steps 2 --batch-size 8 {trust}")
    table = "--num-pictures 66 --num-bands 2 --num-depths 2 --table-steps 2"
    run(f"calibrate exits --budget 1.0 --steps 2 --extractor digits --batch-size 16 {table} {trust}")
    run(f"sample exits --out drawn --num-images 4 --steps 2 --plan exits/plan-ddim-2-b1.json {trust}")
    assert len(list((here / "drawn").rglob("*.png"))) >= 4
    capsys.readouterr()
    run(f"inspect exits {trust}")
    assert "family: my-dit" in (told := capsys.readouterr().out)
    assert "exits: wide heads after layers 1, 2, 3" in told
    run(f"info exits --tflops 1 {trust}")
    assert "my-dit, ddpm, samples of 1 x 8 x 8" in capsys.readouterr().out
    run("inspect exits --trust my_dit")  # a module, as Python finds it from here
    run(f"convert exits copy {trust}")
    assert dyndit.load("copy").depths == (1, 2, 3, 4)


def test_nothing_is_imported_because_a_file_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(here)
    line = refused("sample mine --out drawn --num-images 2", capsys)
    assert "family 'my-dit': a model of your own, saved by my_dit:MyDiT" in line
    assert "--trust MODULE" in line
    assert "my_dit" not in sys.modules
    assert not (here / "drawn").exists()
    with pytest.raises(dyndit.InputError, match=r"expected dyndit.register\('my-dit', ...\) before, or --trust"):
        dyndit.load("mine")
    assert dyndit.load("mine", trust="my_dit").num_blocks == 4
    forget()
    assert dyndit.DynamicDepth.from_pretrained("mine", trust=["my_dit.py"]).num_blocks == 4


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--trust", "--trust: names no module"),
        ("--trust nowhere", "--trust nowhere: ModuleNotFoundError"),
        ("--trust nowhere.py", "--trust nowhere.py: no such file"),
        ("--trust broken.py", "--trust broken.py: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_trusted_is_one_line(flag: str, named: str, here: Path, capsys) -> None:
    (here / "broken.py").write_text("1 / 0")
    assert named in refused(f"inspect digits {flag}", capsys)


def test_a_name_with_another_class_is_refused(here: Path) -> None:
    saved(here)
    forget()
    own = here / "my_dit.py"
    more = "self.more = nn.Linear(2, 2)\n        self.labels = nn.Embedding"
    own.write_text(own.read_text().replace("self.labels = nn.Embedding", more))
    with pytest.raises(dyndit.InputError, match=r"lacks 2 tensors, first net\.more"):
        dyndit.load("mine", trust="my_dit.py")


def test_the_page_counts_its_lines() -> None:
    counts = [
        sum(bool(line.strip()) for line in fence.code.splitlines())
        for fence in fences(OWN_MODEL, "python")
        if fence.title == "my_dit.py"
    ]
    text = (ROOT / OWN_MODEL).read_text()
    assert re.findall(r"(\d+) lines", text) == [str(count) for count in counts]
