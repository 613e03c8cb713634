"""A spatial-temporal DiT through the verbs of every family: train, distill, calibrate, sample, evaluate, report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dyndit
import dyndit.analysis as dyndit_analysis
from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.metrics.sets import read_pictures
from dyndit.analysis.report.verify import verify
from dyndit.cli import main
from dyndit.cli.recipes import find, quickstarts
from dyndit.pictures.clips import writes_mp4
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill

TINY = """
from dyndit.analysis.compare.experiment import Experiment
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.exits import ExitConfig
from dyndit.models.video import VideoConfig
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train

fit = FitConfig(steps=24, batch_size=16, learning_rate=3e-3, ema_decay=0.9)
config = VideoConfig(8, 16, 8, in_channels=1, width=24, num_blocks=3, num_heads=2, rotary_base=100.0, num_classes=10)
train = Train(config, fit, "moving-digits")
distill = Distill(ExitConfig(head="adaln-linear"), fit, "moving-digits")
experiment = Experiment(
    model="", data="moving-digits", extractor="moving-digits", train=train, distill=distill,
    calibration=CalibrationSettings(num_pictures=72, num_bands=2, batch_size=36),
    calibration_steps=2, full_steps=(2, 3), dynamic_steps=(3,), budgets=(0.7,),
    solvers=("ddim",), num_blocks=2, num_images=20, batch_size=10, metrics=("fd", "kid"),
)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("video")
    recipe = root / "recipe.py"
    recipe.write_text(TINY)
    main(["train", str(recipe), "--out", str(root / "backbone"), "--sample-every", "24"])
    main(["distill", str(recipe), "--model", str(root / "backbone"), "--out", str(root / "model")])
    common = ["--steps", "3", "--num-pictures", "72", "--table-steps", "2", "--num-bands", "2", "--own-guides"]
    main(["calibrate", str(root / "model"), "--budget", "0.6", *common, "--out", str(root / "plan.json")])
    return root


def test_training_lowers_the_loss_and_draws_previews(workshop: Path) -> None:
    losses = np.genfromtxt(workshop / "backbone" / "losses.csv", delimiter=",", names=True)["loss"]
    assert losses[-6:].mean() < losses[:6].mean()
    assert (workshop / "backbone" / "previews" / "step-000024.png").exists()
    model = dyndit.load(workshop / "model")
    assert model.identity.backbone == dyndit.load(workshop / "backbone").identity.backbone
    assert model.depths == (1, 2, 3)
    assert model.backbone.sample_shape == (1, 8, 16, 16)
    assert json.loads((workshop / "plan.json").read_text())


def test_a_plan_draws_clips_that_are_measured(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndit.pictures.clips.find_spec", lambda name: None)  # GIF alone: 64 MP4 files take seconds
    out = tmp_path / "out"
    draw = ["sample", str(workshop / "model"), "--out", str(out), "--num-images", "70", "--steps", "3"]
    plan = ["--dynamic", "--plan", str(workshop / "plan.json"), "--stats"]
    main([*draw, *plan])
    names = {path.name for path in out.iterdir()}
    assert {"grid.png", "grid.gif", "000000-class0.png", "000000-class0.gif", "000063-class3.gif"} <= names
    assert "000064-class4.gif" not in names
    model, asked = dyndit.load(workshop / "model"), dyndit.DepthPlan.load(workshop / "plan.json")
    few = dyndit.sample(model, list(range(10)) * 7, plan=asked, num_steps=3).pictures
    assert (read_pictures(out).int() - few.int()).abs().max() <= 1
    main([*draw, *plan])
    assert "70 of 70 pictures were there already" in capsys.readouterr().out
    runs = tmp_path / "runs"
    measure = ["evaluate", str(out), "--reference", "moving-digits", "--extractor", "moving-digits", "--metrics", "fd"]
    main([*measure, "--out", str(runs), "--json"])
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["metric"] == "FD-moving-digits"
    assert figures["fd"] > 0
    assert (figures["num_samples"], figures["num_reference"]) == (70, 4800)
    main(["report", str(runs), "--out", str(tmp_path / "report")])
    assert verify(tmp_path / "report") == []


def test_clips_of_another_shape_are_drawn(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    draw = ["sample", str(workshop / "model"), "--num-images", "2", "--steps", "2"]
    for shape in ("5 16 24", "1 16 16"):
        out = tmp_path / shape.replace(" ", "-")
        main([*draw, "--out", str(out), "--shape", *shape.split()])
        assert read_pictures(out).shape == (2, 1, *map(int, shape.split()))
        expected = {"000000-class0.mp4", "000001-class1.mp4", "grid.mp4"} if writes_mp4() else set()
        assert {path.name for path in out.glob("*.mp4")} == expected
    with pytest.raises(SystemExit):
        main([*draw, "--out", str(tmp_path / "bad"), "--shape", "8", "16", "20"])
    assert "--shape 8 16 20: expected 8 16 16, or another shape that this model takes" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    with pytest.raises(SystemExit):
        main(["sample", "digits", "--num-images", "2", "--out", str(tmp_path / "bad"), "--shape", "16", "16"])
    assert "--shape 16 16: expected 8 8" in capsys.readouterr().err


def test_without_imageio_one_line_says_so(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndit.pictures.clips.find_spec", lambda name: None)
    main(["sample", str(workshop / "model"), "--num-images", "1", "--steps", "2", "--out", str(tmp_path / "out")])
    told = [line for line in capsys.readouterr().out.splitlines() if "MP4" in line]
    assert told == ["no MP4 files: imageio is not installed; expected `pip install 'dyndit[video]'`"]
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_a_comparison_reports_frames(workshop: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["compare", str(workshop / "recipe.py"), "--model", str(workshop / "model"), "--out", str(run)])
    runs = dyndit_analysis.read_runs(run)
    assert set(runs["arm"]) == {"full-ddim-2", "full-ddim-3", "searched-ddim-3-b0.7"}
    assert set(runs["metric"]) == {"FD-moving-digits"}
    macs = runs.groupby("arm")["macs"].first()
    assert 0.2 < macs["searched-ddim-3-b0.7"] / macs["full-ddim-3"] < 0.95
    assert "](frames.png)" in (run / "report.md").read_text()
    assert "All frames of the first clips" in (run / "report.html").read_text()
    assert not (run / "samples.png").exists()
    assert verify(run) == []


def test_exits_learn_from_the_samplers_own_clips(workshop: Path, tmp_path: Path) -> None:
    recipe = Distill(fit=FitConfig(2, 8), states="sampler", num_trajectories=4, num_steps=3, forecasts=True)
    model, result = recipe.run(dyndit.load(workshop / "backbone"), dyndit.open_data("moving-digits"), tmp_path)
    assert result.losses["loss"].notna().all()
    assert torch.isfinite(model.exits.gains).all()


def test_the_recipe_is_a_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert {"digits": "digits", "video": "video"}.items() <= quickstarts().items()
    ran = []
    monkeypatch.setattr("dyndit.cli.results._compare", lambda *args, **options: ran.append((*args, options)))
    for family in (None, "video"):
        main(["quickstart", *(["--family", family] if family else [])])
    named = [(recipe, str(out), options["from_scratch"]) for recipe, _, out, options in ran]
    assert named == [("digits", "runs/quickstart", False), ("video", "runs/quickstart-video", True)]
    chosen = find("video", "quickstart", Experiment)
    chosen.train.check(dyndit.open_data("moving-digits"))
    with pytest.raises(SystemExit):
        main(["quickstart", "--family", "audio"])
    assert "--family audio: expected one of " in capsys.readouterr().err
