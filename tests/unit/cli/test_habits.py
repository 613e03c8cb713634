"""What people expect of a command: the GPU by itself, what was perhaps meant, completion, runs that go on."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.utils import LoggerType
from PIL import Image

import dyndit
from dyndit.cli import VERBS, flags, main, verbs
from dyndit.errors import InputError, did_you_mean, expected_one_of
from dyndit.plans.table import ShiftTable
from dyndit.training import trackers
from support.tiny_verbs import RECIPE

pytestmark = pytest.mark.usefixtures("quick_search")

SMALL = ["--num-pictures", "70", "--batch-size", "35", "--table-steps", "2", "--num-bands", "1", "--num-depths", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a backbone, a model with exits and a table, and two sets of the same seeds."""
    folder = tmp_path_factory.mktemp("habits")
    (folder / "recipe.py").write_text(RECIPE)
    recipe = str(folder / "recipe.py")
    main(["train", recipe, "--out", str(folder / "backbone")])
    main(["distill", recipe, "--model", str(folder / "backbone"), "--out", str(folder / "model")])
    main(["calibrate", str(folder / "model"), "--budget", "1", "--steps", "2", *SMALL])
    draw = ["sample", str(folder / "model"), "--num-images", "4", "--steps", "2", "--out"]
    main([*draw, str(folder / "full")])
    main([*draw, str(folder / "fast"), "--router", "ramp:1"])
    return folder


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dyndit: ")]
    return line


COMPUTES = {"train", "distill", "calibrate", "sample", "evaluate", "bench", "compare", "quickstart", "demo"}
"""Verbs that run a network long enough to choose where."""


def test_every_verb_that_computes_takes_a_device_and_a_precision() -> None:
    for name, verb in verbs([]).items():
        assert ("--device" in flags.flags_of(verb)) == (name in COMPUTES), name
        # Features of pictures are computed in single precision, whoever measures: another one is another metric.
        assert ("--dtype" in flags.flags_of(verb)) == (name in {*COMPUTES, "info"} - {"evaluate"}), name
        device = inspect.signature(verb).parameters.get("device")
        assert device is None or device.default == "auto"


MEANT = [
    (["smaple", "digits"], "did you mean sample?"),
    (
        ["sample", "digits", "--ouput", "x"],
        "(`dyndit sample --help` lists them); did you mean --out?",
    ),
    (["sample", "digits", "--num-image=3"], "did you mean --num-images?"),
    (["sample", "digits", "--out", "{out}", "--solver", "unipk"], "did you mean unipc?"),
    (["sample", "digits", "--out", "{out}", "--router", "rmap:3"], "did you mean ramp?"),
    (["sample", "digits", "--out", "{out}", "--dtype", "bfloat61"], "did you mean bfloat16?"),
    (["sample", "--model", "DiT-XLL/2", "--out", "{out}"], "did you mean DiT-XL/2?"),
    (["sample", "DiT-XL/2", "--out", "{out}"], "`dyndit sample --model DiT-XL/2`"),
    (["info", "DiT-BB/4"], "did you mean DiT-B/4?"),
    (["bench", "random:DiT-S/44"], "did you mean DiT-S/4?"),
    (["train", "cifar1O", "--out", "{out}"], "did you mean cifar10?"),
    (["compare", "digits_frontir", "--out", "{out}"], "did you mean digits_frontier?"),
    (["quickstart", "--family", "vidio", "--out", "{out}"], "did you mean video?"),
    (["calibrate", "{root}/modle", "--budget", "1"], "did you mean model?"),
    (["sample", "{root}/modle", "--out", "{out}"], "did you mean model?"),
    (["evaluate", "{root}/ful", "--reference", "digits"], "did you mean full?"),
    (["evaluate", "{root}/full", "--reference", "digitz"], "did you mean digits?"),
    (["evaluate", "{root}/full", "--reference", "digits", "--extractor", "inceptoin"], "did you mean inception?"),
    (
        ["evaluate", "{root}/full", "--reference", "digits", "--extractor", "digits", "--metrics", "kdi"],
        "did you mean kid?",
    ),
    (["train", "{root}/misspelt.py", "--out", "{out}"], "unexpected keyword argument 'step'; did you mean steps?"),
]


@pytest.mark.parametrize(("arguments", "meant"), MEANT, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_a_misspelt_word_is_refused_with_what_was_perhaps_meant(
    arguments: list[str], meant: str, root: Path, tmp_path: Path, capsys
) -> None:
    (root / "misspelt.py").write_text("from dyndit.training.config import FitConfig\ntrain = FitConfig(step=3)\n")
    filled = [a.format(root=root, out=tmp_path / "out") for a in arguments]
    assert meant in refused(capsys, *filled)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_is_meant_is_said_only_if_it_is_near() -> None:
    assert did_you_mean("UNIPC", ["ddim", "unipc"]) == "; did you mean unipc?"
    assert did_you_mean("something else", ["ddim", "unipc"]) == ""
    assert expected_one_of("dim", ("ddim", "unipc")) == "expected one of ddim, unipc; did you mean ddim?"


def test_a_relative_path_is_no_hub_id_where_its_folder_is(tmp_path: Path, capsys, monkeypatch) -> None:
    """runs/digist could be organisation "runs" on the hub. Nothing is fetched for a typing error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    line = refused(capsys, "sample", "runs/digist", "--out", "out")
    assert "runs/digist: no such file or folder; did you mean digits?" in line
    assert "runs/digist@main is the hub's model" in line


def test_the_flags_of_a_verb_are_those_that_its_help_lists(capsys) -> None:
    for name, verb in verbs([]).items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert all(flag in text for flag in flags.flags_of(verb)), name


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_verbs_and_flags(shell: str, tmp_path: Path) -> None:
    """The command of docs/cli.md, in a fresh process that imports no torch."""
    command = f"main(['--tyro-write-completion', {shell!r}, {str(tmp_path / 'dyndit')!r}])"
    code = f"import sys\nfrom dyndit.cli import main\ntry:\n    {command}\nexcept SystemExit:\n    pass\n"
    done = subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], check=False)
    assert done.returncode == 0
    script = (tmp_path / "dyndit").read_text()
    assert all(verb in script for verb in VERBS)
    assert "--num-images" in script


def test_a_stored_table_is_searched_without_drawing(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ("measure_shifts", "OwnSampler.drawn", "measure_bases"):
        monkeypatch.setattr(f"dyndit.calibration.calibrate.{name}", None)
    monkeypatch.setattr("dyndit.analysis.load_extractor", None)
    out = tmp_path / "plan.json"
    main(["calibrate", str(root / "model"), "--budget", "1", "--steps", "4", "--search-only", "--out", str(out)])
    assert "predicted, not measured" in capsys.readouterr().out
    plan = dyndit.DepthPlan.load(out)
    assert (plan.num_steps, plan.budget) == (4, 1.0)
    assert "measured_fd" not in plan.figures
    goal = ["--latency-budget", "1.0", "--search-only", "--out", str(out)]
    main(["calibrate", str(root / "model"), *goal])
    assert dyndit.DepthPlan.load(out).router == "chosen"


def test_searching_alone_needs_a_table_and_draws_nothing(root: Path, capsys) -> None:
    line = refused(capsys, "calibrate", root / "backbone", "--budget", "1", "--search-only")
    assert "has no exits" in line or "no such file" in line
    for flag in (["--fresh"], ["--refinements", "1"], ["--step-grid", "2"]):
        line = refused(capsys, "calibrate", root / "model", "--budget", "1", "--search-only", *flag)
        assert f"{flag[0]} draws pictures" in line


def test_a_plan_file_brings_its_solver_steps_and_scale(root: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    at = ["--solver", "unipc", "--steps", "3"]
    main(["calibrate", str(root / "model"), "--budget", "1", *at, "--search-only", "--out", str(plan)])
    out = tmp_path / "set"
    main(["sample", str(root / "model"), "--plan", str(plan), "--num-images", "2", "--out", str(out)])
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert (settings["solver"], settings["steps"], settings["cfg_scale"]) == ("unipc", 3, 1.5)


def test_sets_of_one_seed_are_put_side_by_side(root: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "beside.png"
    main(["grid", str(root / "full"), str(root / "fast"), "--out", str(out), "--num-images", "3"])
    with Image.open(out) as image:
        assert image.width >= 480
    other = tmp_path / "other"
    main(["sample", str(root / "model"), "--num-images", "4", "--steps", "2", "--seed", "1", "--out", str(other)])
    assert "seed 1, expected 0" in refused(capsys, "grid", root / "full", other, "--out", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


RUN = ["train", "{root}/recipe.py", "--out", "{out}"]


def test_a_training_goes_on_to_more_steps(root: Path, tmp_path: Path, capsys) -> None:
    """A constant rate: three steps after two are three steps, to the bit. A cosine needs --extend, and says so."""
    run = [a.format(root=root, out=tmp_path / "run") for a in RUN]
    main(run)
    main([*run, "--steps", "3"])
    main([*[a.format(root=root, out=tmp_path / "whole") for a in RUN], "--steps", "3"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    falling = tmp_path / "falling.py"
    falling.write_text(RECIPE.replace("often = dict(", "often = dict(schedule='cosine', "))
    cosine = ["train", str(falling), "--out", str(tmp_path / "cosine")]
    main(cosine)
    line = refused(capsys, *cosine, "--steps", "3")
    assert "made with steps 2 of the cosine schedule, found 3" in line
    assert "--extend" in line
    main([*cosine, "--steps", "3", "--extend"])
    manifest = json.loads((tmp_path / "cosine" / "manifest.json").read_text())
    assert manifest["extended"] == [2]
    assert manifest["fit"]["steps"] == 3


def test_exits_are_distilled_on(root: Path, tmp_path: Path) -> None:
    run = ["distill", str(root / "recipe.py"), "--model", str(root / "backbone"), "--out", str(tmp_path / "model")]
    main(run)
    main([*run, "--steps", "2"])
    assert len((tmp_path / "model" / "distillation" / "losses.csv").read_text().splitlines()) == 1 + 2


def test_weights_are_for_colleagues_too(root: Path, tmp_path: Path) -> None:
    """Under umask 022 everybody may read what a run leaves, whatever library wrote it."""
    code = (
        "import os, sys\nos.umask(0o022)\nfrom dyndit.cli import main\n"
        f"main(['convert', {str(root / 'model')!r}, {str(tmp_path / 'native')!r}])\n"
        f"main(['convert', {str(root / 'model')!r}, {str(tmp_path / 'dit.pt')!r}, '--to', 'official'])\n"
        f"main(['convert', {str(root / 'model')!r}, {str(tmp_path / 'diffusers')!r}, '--to', 'diffusers'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".pt"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


def test_a_training_is_tracked_by_tensorboard_or_nobody(root: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for tracker in ("tensorboard", "none"):
        run = [a.format(root=root, out=tmp_path / tracker) for a in RUN]
        main([*run, "--tracker", tracker])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tensorboard")).Reload()
    assert {"loss", "grad_norm", "learning_rate", "steps_per_second"} <= set(events.Tags()["scalars"])
    losses = (tmp_path / "tensorboard" / "losses.csv").read_text().splitlines()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [float(line.split(",")[1]) for line in losses[1:]]
    )
    assert not (tmp_path / "none" / "tensorboard").exists()
    assert (tmp_path / "none" / "model.safetensors").read_bytes() == (
        tmp_path / "tensorboard" / "model.safetensors"
    ).read_bytes()


class FakeWandb:
    """What accelerate uses of wandb."""

    def __init__(self) -> None:
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options: object) -> "FakeWandb":
        self.begun.append(options)
        return self

    def log(self, values: dict, step: int | None = None) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_a_training_is_tracked_by_wandb(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The figures of losses.csv go to one run of W&B, in which a resumed training goes on."""
    run = [*[a.format(root=root, out=tmp_path / "run") for a in RUN], "--tracker", "wandb"]
    monkeypatch.setattr(trackers, "has_wandb", lambda: False)
    assert "--tracker wandb: not installed; expected `pip install 'dyndit[wandb]'`" in refused(capsys, *run)
    monkeypatch.setattr(trackers, "has_wandb", lambda: True)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    main(run)
    main([*run, "--steps", "3"])
    first, second = fake.begun
    assert (first["project"], first["name"], first["resume"]) == ("dyndit", "run", "allow")
    assert first["id"] == second["id"]
    assert [step for step, _ in fake.logged] == [1, 2, 3]
    losses = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    assert [values["loss"] for _, values in fake.logged] == pytest.approx(
        [float(line.split(",")[1]) for line in losses[1:]]
    )
    assert fake.finished == 2


def test_trainings_choose_device_and_precision(root: Path, tmp_path: Path, capsys) -> None:
    run = [a.format(root=root, out=tmp_path / "run") for a in RUN]
    main([*run, "--device", "cpu", "--dtype", "bfloat16"])
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["fit"]["precision"] == "bf16"
    assert "expected one of auto, own, float32, bfloat16" in refused(capsys, *run, "--dtype", "float16")
    assert "--device quantum" in refused(capsys, *run, "--device", "quantum")


def test_python_extends_and_leaves_files_as_the_command_does(root: Path, tmp_path: Path) -> None:
    model, digits = dyndit.load(root / "model"), dyndit.load_extractor("digits")
    pictures = dyndit.open_data("digits").uint8()
    settings = dyndit.CalibrationSettings(num_pictures=70, num_bands=1, batch_size=35, num_depths=1)
    measure = {"extractor": digits, "reference": pictures, "settings": settings, "num_steps": 2, "out": tmp_path / "m"}
    plan = dyndit.calibrate(model, budget=1.0, **measure)
    names = {"shift-table.safetensors", "plan-ddim-2-b1.json"}
    assert {path.name for path in (tmp_path / "m").iterdir()} - {".lock"} == names
    assert dyndit.DepthPlan.load(tmp_path / "m" / "plan-ddim-2-b1.json") == plan
    before = (tmp_path / "m" / "shift-table.safetensors").read_bytes()
    dyndit.calibrate(model, budget=1.0, num_steps=4, out=tmp_path / "m")  # the table there is searched
    assert (tmp_path / "m" / "shift-table.safetensors").read_bytes() == before
    assert (tmp_path / "m" / "plan-ddim-4-b1.json").is_file()
    with pytest.raises(InputError, match="measured with 70 pictures, but 80 asked for"):
        dyndit.calibrate(model, budget=1.0, settings=dyndit.CalibrationSettings(80, 1), out=tmp_path / "m")
    table = ShiftTable.load(tmp_path / "m" / "shift-table.safetensors")
    dyndit.calibrate(model, budget=1.0, table=table, out=tmp_path / "given")
    assert (tmp_path / "given" / "shift-table.safetensors").read_bytes() == before
    assert np.isfinite(plan.figures["measured_fd"])
