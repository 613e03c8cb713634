"""An MM-DiT through the same verbs as every family: train, distill, calibrate, sample, evaluate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dyndit
import dyndit.analysis as dyndit_analysis
from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.report.verify import verify
from dyndit.cli import main
from dyndit.cli.recipes import find, quickstarts
from dyndit.models.captions import Encoded
from dyndit.models.mmdit import MMDiTConfig
from dyndit.process import RectifiedFlow
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill
from dyndit.training.exit_errors import exit_error_table
from dyndit.training.train import Train
from support.tiny_pipelines import clip, tokenizer

TINY = """
from dyndit.analysis.compare.experiment import Experiment
from dyndit.calibration.measure import CalibrationSettings
from dyndit.models.exits import ExitConfig
from dyndit.models.mmdit import MMDiTConfig
from dyndit.process import RectifiedFlow
from dyndit.training.captioned import PROMPTS, VOCABULARY
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train

fit = FitConfig(steps=30, batch_size=32, learning_rate=3e-3, ema_decay=0.9, flip=False)
train = Train(
    MMDiTConfig(8, 4, 1, width=24, num_blocks=3, num_heads=2, text_width=16, pooled_width=16, text_length=6,
                vocabulary=VOCABULARY, prompts=PROMPTS),
    fit, "captioned-digits", RectifiedFlow(),
)
distill = Distill(ExitConfig(head="adaln-linear"), fit, "captioned-digits")
experiment = Experiment(
    model="", data="captioned-digits", extractor="digits", train=train, distill=distill,
    calibration=CalibrationSettings(num_pictures=80, num_bands=2, batch_size=40),
    calibration_solver="flow-euler", calibration_steps=2, full_steps=(2, 3), dynamic_steps=(3,), budgets=(0.7,),
    solvers=("flow-heun",), full_solvers=("flow-euler",), num_blocks=2, num_images=70, batch_size=35,
)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mmdit")
    recipe = root / "recipe.py"
    recipe.write_text(TINY)
    main(["train", str(recipe), "--out", str(root / "backbone"), "--sample-every", "30"])
    main(["distill", str(recipe), "--model", str(root / "backbone"), "--out", str(root / "model")])
    common = ["--steps", "4", "--num-pictures", "80", "--table-steps", "4", "--num-bands", "2"]
    common += ["--reference", "captioned-digits", "--own-guides"]
    main(["calibrate", str(root / "model"), "--budget", "0.6", *common, "--out", str(root / "plan.json")])
    return root


def test_training_lowers_the_loss_and_draws_previews(workshop: Path) -> None:
    losses = np.genfromtxt(workshop / "backbone" / "losses.csv", delimiter=",", names=True)["loss"]
    assert losses[-8:].mean() < 0.8 * losses[:8].mean()
    assert (workshop / "backbone" / "previews" / "step-000030.png").exists()
    model = dyndit.load(workshop / "model")
    assert model.identity.backbone == dyndit.load(workshop / "backbone").identity.backbone
    assert (model.depths, model.process) == ((1, 2, 3), RectifiedFlow())


def test_prompts_are_drawn_and_measured(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    draw = ["sample", str(workshop / "model"), "--out", str(out), "--num-images", "3", "--steps", "4"]
    prompts = ["--prompt", "number seven, bold, tilted", "a three"]
    main([*draw, *prompts, "--plan", str(workshop / "plan.json"), "--dynamic"])
    names = [f"{i:06d}-{word}.png" for i, word in enumerate(["number-seven-bold-tilted", "a-three"])]
    assert sorted(path.name for path in out.glob("0*.png")) == [*names, "000002-number-seven-bold-tilted.png"]
    archive = np.load(out / "samples.npz")
    assert archive["arr_1"].tolist() == ["number seven, bold, tilted", "a three", "number seven, bold, tilted"]
    main([*draw, *prompts, "--plan", str(workshop / "plan.json"), "--dynamic"])
    assert "3 of 3 pictures were there already" in capsys.readouterr().out
    whole = tmp_path / "whole"
    main(["sample", str(workshop / "model"), "--out", str(whole), "--num-images", "80", "--steps", "2"])
    assert json.loads((whole / "manifest.json").read_text())["settings"]["solver"] == "flow-euler"
    measure = ["evaluate", str(whole), "--reference", "captioned-digits", "--extractor", "digits", "--metrics", "fd"]
    main([*measure, "--json"])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["fd"] > 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--prompt", "a cat"], "--prompt 'a cat': unknown word 'cat'"),
        (["--class-labels", "3"], "--class-labels 3: this model takes captions; expected --prompt"),
        (["--class-labels", "3", "--prompt", "three"], "--class-labels and --prompt: both given"),
    ],
)
def test_what_is_no_prompt_is_refused_before_anything_is_written(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(workshop / "model"), "--out", str(tmp_path / "out"), "--num-images", "2", *more])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_captions_names_no_reference_by_itself(workshop: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", str(workshop / "model"), "--budget", "0.6", "--fresh"])
    assert "--reference: missing; expected a folder of real pictures, or one of digits, captioned-digits" in (
        capsys.readouterr().err
    )


def test_a_comparison_reports_it_as_any_family(workshop: Path, tmp_path: Path) -> None:
    main(["compare", str(workshop / "recipe.py"), "--model", str(workshop / "model"), "--out", str(tmp_path / "run")])
    runs = dyndit_analysis.read_runs(tmp_path / "run")
    assert set(runs["arm"]) == {f"full-{s}-{n}" for s in ("flow-heun", "flow-euler") for n in (2, 3)} | {
        "searched-flow-heun-3-b0.7"
    }
    macs = runs.groupby("arm")["macs"].first()
    assert macs["full-flow-heun-3"] / macs["full-flow-euler-3"] == pytest.approx(5 / 3)
    assert 0.3 < macs["searched-flow-heun-3-b0.7"] / macs["full-flow-heun-3"] < 0.9
    assert (tmp_path / "run" / "report.html").exists()
    assert verify(tmp_path / "run") == []


def test_features_of_a_text_encoder_take_the_place_of_words(workshop: Path, tmp_path: Path) -> None:
    clip(projected=True).save_pretrained(tmp_path / "encoder")
    tokenizer(True).save_pretrained(tmp_path / "encoder")
    recipe, out = str(workshop / "recipe.py"), tmp_path / "features"
    main(["train", recipe, "--out", str(out), "--text-encoder", str(tmp_path / "encoder"), "--steps", "3"])
    model = dyndit.load(out)
    assert isinstance(model.backbone.condition, Encoded)
    distilled, _ = Distill(fit=FitConfig(2, 16), states="sampler", num_trajectories=8, solver="flow-euler").run(
        model, dyndit.open_data("captioned-digits"), tmp_path / "exits"
    )
    pictures = dyndit.sample(distilled, ["a red cat"], solver="flow-euler", num_steps=2).pictures
    assert pictures.shape == (1, 1, 8, 8)
    errors = exit_error_table(distilled, dyndit.open_data("captioned-digits"), num_pictures=8, num_bands=2)
    assert errors.notna().all().all()


def test_class_tokens_train_on_labels(tmp_path: Path) -> None:
    config = MMDiTConfig(
        8, 4, 1, width=24, num_blocks=2, num_heads=2, text_width=8, pooled_width=8, text_length=1, num_classes=10
    )
    recipe = Train(config, FitConfig(3, 16, learning_rate=3e-3), process=RectifiedFlow())
    model, result = recipe.run(load_digits(), tmp_path)
    assert result.losses["loss"].notna().all()
    assert dyndit.sample(model, [3, 7], solver="flow-euler", num_steps=2).labels == (3, 7)
    again, _ = recipe.run(load_digits(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_recipe_of_classes_takes_no_text_encoder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "digits", "--out", str(tmp_path / "out"), "--text-encoder", str(tmp_path)])
    assert "digits trains a DiTConfig; expected an MMDiTConfig" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "digits", "--out", str(tmp_path / "out"), "--process", "edm"])
    assert "--process edm: expected one of ddpm, flow" in capsys.readouterr().err


def test_every_family_has_a_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert quickstarts() == {"digits": "digits", "flow": "digits_flow", "mmdit": "mmdit", "video": "video"}
    ran = []
    monkeypatch.setattr("dyndit.cli.results._compare", lambda *args, **options: ran.append((*args, options)))
    for family in (None, "flow", "mmdit"):
        main(["quickstart", *(["--family", family] if family else [])])
    named = [(recipe, str(out), options["from_scratch"]) for recipe, _, out, options in ran]
    assert named == [
        ("digits", "runs/quickstart", False),
        ("digits_flow", "runs/quickstart-flow", True),
        ("mmdit", "runs/quickstart-mmdit", True),
    ]
    for recipe in quickstarts().values():
        assert find(recipe, "quickstart", Experiment).train is not None
    with pytest.raises(SystemExit):
        main(["quickstart", "--family", "audio"])
    assert "--family audio: expected one of " in capsys.readouterr().err
