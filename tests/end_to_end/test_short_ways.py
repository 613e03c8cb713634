"""Short ways: how many files a plan and a budget enter between the command line and the blocks, counted by tracing.

A file is entered when one of its functions is called with the plan, a step of it, or the work of a step (or, on the way
of a budget, with the budget, the table, the prediction or the cost that it is searched by).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import dyndit
from dyndit.cli import main
from dyndit.models.dynamic import DynamicDepth, StepInputs, Work
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.predictor import Predictor
from dyndit.plans.schedules import ramp
from dyndit.plans.step import Step
from dyndit.plans.table import ShiftTable
from dyndit.sampling.loop import full_plan

ROOT = Path(dyndit.__file__).resolve().parent
ENTRY = "cli/__init__.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged digits with untrained exits."""
    backbone = dyndit.load("digits", device="cpu").backbone
    folder = tmp_path_factory.mktemp("model")
    DynamicDepth(backbone, Exits(backbone, ExitConfig())).eval().save_pretrained(folder)
    return folder


@contextmanager
def traced(kinds: tuple[type, ...], names: tuple[str, ...], beside: tuple[str, ...] = ()) -> Iterator[dict[str, int]]:
    """Count the calls that get an argument of these kinds or names, by file. Calls within `beside` are not counted."""
    entered: dict[str, int] = {}
    inside: list[FrameType] = []

    def is_meant(value: object) -> bool:
        return isinstance(value, kinds) or (isinstance(value, type) and issubclass(value, kinds))

    def on_event(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(str(ROOT)):
            return
        if event == "return" and inside and inside[-1] is frame:
            inside.pop()
        if event != "call" or inside:
            return
        if code.co_qualname in beside:
            inside.append(frame)
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = {name: frame.f_locals.get(name) for name in arguments}
        meant = any(is_meant(value) or (name in names and value is not None) for name, value in values.items())
        if meant or code.co_name in ("sample", "calibrate"):
            file = Path(os.path.relpath(code.co_filename, ROOT)).as_posix()
            entered[file] = entered.get(file, 0) + 1

    sys.setprofile(on_event)
    try:
        yield entered
    finally:
        sys.setprofile(None)


def test_a_plan_enters_six_files_and_is_bound_once(model: Path, tmp_path: Path, monkeypatch) -> None:
    dynamic, bound = dyndit.load(model), []
    ramp(full_plan(dynamic, "ddim", 4, 1.5), dynamic.depths, 3).save(tmp_path / "plan.json")
    monkeypatch.setattr("dyndit.sampling.sample.bind", lambda *a, **k: bound.append(1) or bind(*a, **k))
    arguments = [
        "--plan",
        str(tmp_path / "plan.json"),
        "--steps",
        "4",
        "--num-images",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    with traced((DepthPlan, Step, Work, StepInputs), ()) as entered:
        main(["sample", str(model), *arguments])
    assert sorted(entered) == [
        "cli/pictures.py",
        "models/dynamic.py",
        "plans/plan.py",
        "plans/step.py",
        "sampling/loop.py",
        "sampling/sample.py",
    ]
    assert bound == [1]


def test_a_budget_enters_nine_files(model: Path, tmp_path: Path) -> None:
    """With the table there; that the plan is drawn at the end, to be measured, is the way of a plan."""
    common = ["--steps", "4", "--num-pictures", "80", "--table-steps", "2", "--num-bands", "2", "--num-depths", "2"]
    arguments = ["calibrate", str(model), *common, "--out", str(tmp_path / "plan.json")]
    main([*arguments, "--budget", "0.8"])
    kinds = (DepthPlan, ShiftTable, Predictor, CostModel)
    with traced(kinds, ("budget",), beside=("OwnSampler.drawn",)) as entered:
        main([*arguments, "--budget", "0.6"])
    assert len(entered) <= 9, sorted(entered)
    assert {"cli/plans.py", "calibration/calibrate.py", "plans/search.py", "plans/plan.py"} <= entered.keys()
