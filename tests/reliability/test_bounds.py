"""Every value of every flag and argument: checked before anything is written."""

import dataclasses
import hashlib
import inspect
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import pytest
import torch

import dyndit
from dyndit import bounds
from dyndit.analysis.report.write import write_report
from dyndit.calibration import calibrate as calibration
from dyndit.calibration.measure import CalibrationSettings
from dyndit.cli import VERBS, flags, main, verbs
from dyndit.errors import InputError
from dyndit.plans.step_counts import LatencyBudget, TargetFD
from dyndit.process import DDPM
from dyndit.sampling.budget import plan_on_table
from dyndit.storage import load as checkpoints
from dyndit.training.config import FitConfig
from dyndit.training.data import PACKAGED
from dyndit.training.recorded import record_sampling
from support.tables import random_table

NEEDED = {
    "train": ["digits", "--out", "{out}"],
    "distill": ["finetune_exits", "--model", "{model}", "--out", "{out}"],
    "calibrate": ["{model}", "--budget", "0.6"],
    "plan": ["edit", "{plan}", "--out", "{out}"],
    "sample": ["{model}", "--out", "{out}"],
    "grid": ["{model}", "--out", "{out}"],
    "evaluate": ["{model}", "--reference", "digits", "--out", "{out}"],
    "bench": ["{model}", "--out", "{out}"],
    "report": ["{model}", "--out", "{out}"],
    "compare": ["digits", "--out", "{out}"],
    "convert": ["{model}", "{out}"],
    "quickstart": ["--out", "{out}"],
    "inspect": ["{model}"],
    "info": ["{model}"],
    "demo": ["{model}", "--out", "{out}"],
}
"""A command of each verb."""

VALUES = ("nan", "inf", "-inf", "-1", "0", "1e300", "100000000000000000000", "-100000000000000000000", "1.5", "x", "")


def numbers(verb: str) -> dict[str, object]:
    """The flags of a verb that take numbers, with their types; groups of flags are opened."""
    found = {}
    for name, kind in typing.get_type_hints(inspect.unwrap(verbs([])[verb])).items():
        group = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {name: kind}
        for flag, each in group.items():
            parts = {each, *typing.get_args(each)} - {type(None), types.EllipsisType}
            if parts & {int, float}:
                found[flag] = int if int in parts else float
    return found


FLAGS = [(verb, flag) for verb in VERBS for flag in numbers(verb)]


@pytest.fixture(scope="module")
def places(tmp_path_factory, make_model) -> dict[str, Path]:
    """A model with exits and a plan beside it."""
    root = tmp_path_factory.mktemp("places")
    model = make_model(num_blocks=2, width=8, num_heads=2)
    checkpoints.save(model, root / "model")
    calibration.full_plan(model, "ddim", 2, 1.5).save(root / "plan.json")
    return {"root": root, "model": root / "model", "plan": root / "plan.json", "out": root / "out"}


def tree(root: Path) -> dict[str, str]:
    """Every path below `root`, with its hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


def refused(places: dict[str, Path], arguments: list[str]) -> int:
    """Run a command that has to be refused -> its exit status. Nothing was created or changed."""
    before = tree(places["root"])
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**places) for argument in arguments])
    assert tree(places["root"]) == before, arguments
    return stop.value.code


def test_every_number_has_a_bound() -> None:
    """A new flag that takes a number needs an entry in `BOUNDS`."""
    assert len(FLAGS) > 40
    assert {flag for _, flag in FLAGS} <= bounds.BOUNDS.keys()


LEAST = {
    1: "accumulation batch_size checkpoint_every epochs image_size log_every max_rounds num_bands num_classes "
    "num_depths num_heads num_images num_pictures num_steps reference_steps resize_and_crop rounds shape step_grid "
    "steps table_steps",
    0: "first_index forecast_ages guided_channels layers learning_rate margin num_workers port refinements "
    "sample_every seed until",
    2: "reference_count",
}
"""What may be so few, and no fewer."""
ABOVE_0 = ("budget", "latency_budget", "max_gib", "target_fd", "tflops")
MOST = {
    **dict.fromkeys(("num_steps", "reference_steps", "step_grid", "table_steps", "num_bands"), DDPM().num_timesteps),
    "seed": torch.iinfo(torch.int64).max,
    "port": (1 << 16) - 1,
    **dict.fromkeys(("budget", "latency_budget"), 1),
}
"""What may be so much, and no more: timesteps there are, what a generator takes, ports, whole of a time."""


def test_bounds_are_where_sense_ends() -> None:
    least = {name: number for number, names in LEAST.items() for name in names.split()}
    assert {*least, *ABOVE_0, "cfg_scale"} == bounds.BOUNDS.keys()
    for name, number in least.items():
        assert bounds.BOUNDS[name].holds(number), name
        assert not bounds.BOUNDS[name].holds(number - 1), name
        assert bounds.BOUNDS[name].holds(number + 1), name
    for name in ABOVE_0:
        assert [bounds.BOUNDS[name].holds(number) for number in (-1e-9, 0, 1e-9, 0.5, 1)] == [False] * 2 + [True] * 3
    for name, number in MOST.items():
        assert bounds.BOUNDS[name].holds(number), name
        assert not bounds.BOUNDS[name].holds(number + 1), name
        assert number == 1 or not bounds.BOUNDS[name].holds(number - 0.5), name  # whole numbers alone
    assert not any(bound.holds(value) for bound in bounds.BOUNDS.values() for value in (True, "1", None, 10**400))


@pytest.mark.reliability("Numbers out of bounds, of every flag of every verb: status 2, nothing created or changed")
@pytest.mark.parametrize(("verb", "flag"), FLAGS)
def test_numbers_out_of_bounds_are_refused(verb: str, flag: str, places: dict[str, Path]) -> None:
    kind, bound, tried = numbers(verb)[flag], bounds.BOUNDS[flag], 0
    for value in VALUES:
        try:
            if bound.holds(kind(value)):
                continue
        except ValueError:
            pass
        tried += 1
        given = [f"--{flag.replace('_', '-')}={value}"] if value.startswith("-") else []
        given = given or [f"--{flag.replace('_', '-')}", value]
        assert refused(places, [verb, *NEEDED[verb], *given]) == 2
    assert tried > 4


PATHS = [
    ["train", "digits", "--out", "{out}", "--data", "{root}/none"],
    ["train", "digits", "--out", ""],
    ["train", "{root}/none.py", "--out", "{out}"],
    ["train", "digits", "--out", "{out}", "--vae", "{root}/none"],
    ["train", "digits", "--out", "{out}", "--model", "{root}/none"],
    ["distill", "finetune_exits", "--model", "{root}/none", "--out", "{out}"],
    ["distill", "finetune_exits", "--model", "{model}", "--out", "{out}", "--vae", "{root}/none"],
    ["calibrate", "{root}/none", "--budget", "0.6"],
    ["calibrate", "{model}", "--budget", "0.6", "--reference", "{root}/none"],
    ["calibrate", "{model}", "--budget", "0.6", "--extractor-weights", "{root}/none"],
    ["calibrate", "{model}", "--budget", "0.6", "--vae", "{root}/none"],
    ["plan", "show", "{root}/none.json"],
    ["sample", "{root}/none", "--out", "{out}"],
    ["sample", "{model}", "--out", "{out}", "--plan", "{root}/none.json"],
    ["sample", "{model}", "--out", "{out}", "--vae", "{root}/none"],
    ["evaluate", "{root}/none", "--reference", "digits"],
    ["evaluate", "{model}", "--reference", "{root}/none"],
    ["evaluate", "{model}", "--reference", "digits", "--lpips-weights", "{root}/none"],
    ["evaluate", "{model}", "--reference", "digits", "--extractor-weights", "{root}/none"],
    ["evaluate", "{model}", "--reference", "digits", "--full", "{root}/none"],
    ["bench", "{root}/none"],
    ["bench", "{model}", "--vae", "{root}/none"],
    ["report", "{root}/none", "--out", "{out}"],
    ["report", "--verify", "{root}/none"],
    ["compare", "digits", "--out", "{out}", "--data", "{root}/none"],
    ["compare", "digits", "--out", "{out}", "--model", "{root}/none"],
    ["compare", "{root}/none.py", "--out", "{out}"],
    ["convert", "{root}/none", "{out}"],
    ["inspect", "{root}/none"],
    ["info", "{root}/none"],
    ["demo", "{root}/none"],
    ["grid", "{root}/none", "--out", "{out}"],
    ["sample", "--model", "DiT-XL/2", "--out", "{out}", "--ckpt", "{root}/none"],
    ["train", "mmdit", "--out", "{out}", "--data", "digits", "--text-encoder", "{root}/none"],
    ["evaluate", "--self-check", "{root}/none"],
    ["quickstart", "--out", ""],
]


@pytest.mark.reliability("A path that is not there is refused before any library is loaded, with nothing created")
def test_a_missing_path_is_refused_before_any_library_is_loaded(places: dict[str, Path], tmp_path: Path) -> None:
    """In one fresh process: no command loads torch."""
    script = tmp_path / "refuse.py"
    filled = [[argument.format(**places) for argument in arguments] for arguments in PATHS]
    script.write_text(
        "import sys\nfrom dyndit.cli import main\n"
        f"for arguments in {filled!r}:\n"
        "    try:\n        main(arguments)\n        print('not refused', arguments)\n"
        "    except SystemExit as stop:\n        assert stop.code == 2, arguments\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    before, began = tree(places["root"]), time.process_time()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-500:]
    assert time.process_time() - began < 10
    assert len([line for line in done.stderr.splitlines() if line.startswith("dyndit: ")]) == len(PATHS)
    assert tree(places["root"]) == before


WRONG = [
    ["sample", "{model}", "--out", "{out}", "--guided-channels", "99"],
    ["sample", "{model}", "--out", "{out}", "--device", "meta"],
    ["sample", "{model}", "--out", "{out}", "--steps", "1001"],
    ["sample", "{model}", "--out", "{out}", "--class-labels", "99"],
    ["calibrate", "{model}", "--budget", "0.6", "--device", "meta"],
    ["calibrate", "{model}", "--budget", "0.6", "--num-pictures", "3"],
    ["plan", "edit", "{plan}", "--out", "{out}", "--step", "7=1"],
    ["plan", "edit", "{plan}", "--out", "{out}", "--step", "0=9|9"],
    ["plan", "edit", "{plan}", "--out", "{plan}"],
    ["plan", "edit", "{plan}"],
    ["plan", "show", "{plan}", "--unbind"],
    ["bench", "{model}", "--device", "meta"],
    ["sample", "{model}", "--out", "{out}", "--max-gib", "nan"],
    ["sample", "{model}", "--out", "{out}", "--max-gib"],
]


@pytest.mark.reliability("Values that do not fit the model: exit status 2, and nothing created or changed")
@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_values_that_do_not_fit_are_refused(arguments: list[str], places: dict[str, Path]) -> None:
    assert refused(places, arguments) == 2


TABLE = random_table(2, 3, seed=0)

PYTHON = {
    "sample cfg_scale": lambda m, out: dyndit.sample(m, [0], cfg_scale=float("nan"), num_steps=1),
    "sample seed": lambda m, out: dyndit.sample(m, [0], seed=2**64, num_steps=1),
    "sample batch_size": lambda m, out: dyndit.sample(m, [0], batch_size=0, num_steps=1),
    "sample guided_channels": lambda m, out: dyndit.sample(m, [0], guided_channels=99, num_steps=1),
    "sample num_steps": lambda m, out: dyndit.sample(m, [0], num_steps=10**20),
    "record": lambda m, out: record_sampling(m, [0], out, cfg_scale=float("inf"), num_steps=1),
    "calibrate": lambda m, out: calibration.calibrate(m, budget=float("nan"), table=TABLE),
    "calibrate_steps": lambda m, out: calibration.calibrate_steps(m, TargetFD(1.0), table=TABLE, batch_size=-1),
    "plan_on_table": lambda m, out: plan_on_table(m, TABLE, budget=2.0, solver="ddim", num_steps=2),
    "measure_bases": lambda m, out: calibration.measure_bases(m, TABLE, None, step_grid=(0,)),
    "settings": lambda m, out: CalibrationSettings(num_bands=0),
    "settings depths": lambda m, out: CalibrationSettings(num_depths=0),
    "settings pictures": lambda m, out: CalibrationSettings(num_pictures=2**70),
    "target": lambda m, out: TargetFD(float("nan")),
    "latency": lambda m, out: LatencyBudget(float("inf")),
    "report": lambda m, out: write_report(out, out, margin=float("nan")),
    "fit rate": lambda m, out: FitConfig(1, 1, learning_rate=float("nan")),
    "fit steps": lambda m, out: FitConfig(10**20, 1),
    "fit seed": lambda m, out: FitConfig(1, 1, seed=2**64),
    "fit betas": lambda m, out: FitConfig(1, 1, betas=(0.9, float("nan"))),
}


@pytest.mark.reliability("Numbers out of bounds in Python: the same bounds, nothing written")
@pytest.mark.parametrize("entry", PYTHON)
def test_python_has_the_same_bounds(entry: str, make_model, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        PYTHON[entry](make_model(num_blocks=2, width=8, num_heads=2), tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_names_patterns_and_hub_ids_are_no_missing_paths(tmp_path: Path) -> None:
    assert set(bounds.NAMES) == {"", *PACKAGED}
    (tmp_path / "train-0.tar").touch()
    bounds.check_inputs({"data": str(tmp_path / "train-*.tar"), "reference": "moving-digits"})
    for missing in ("train-*.tar", "*", "x", "../none/**"):
        with pytest.raises(InputError, match="no such file or folder"):
            bounds.check_inputs({"data": str(tmp_path / "none" / missing)})
    seen = []

    @flags.checked
    def verb(vae: Path | None = None) -> None:
        seen.append(vae)

    for vae in (None, Path("mse"), Path("org/name"), Path("org/name@main"), tmp_path):
        verb(vae)
    with pytest.raises(InputError, match=r"--vae .*no such file"):
        verb(tmp_path / "none")
    assert len(seen) == 5
