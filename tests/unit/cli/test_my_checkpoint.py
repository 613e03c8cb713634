"""`dyndit compare --model my-dit.pt --data pictures/`: the whole job on one's own checkpoint, without a recipe."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import dyndit
from dyndit.analysis import read_runs, verify
from dyndit.calibration.measure import CalibrationSettings
from dyndit.cli import main
from dyndit.process import RectifiedFlow
from dyndit.recipes import my_checkpoint
from dyndit.storage.convert import convert
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from support.autoencoders import make_autoencoder
from support.models import MakeModel
from support.tiny_verbs import fixed_cost

pytestmark = pytest.mark.usefixtures("quick_search")

SMALL = replace(
    my_checkpoint.experiment,
    distill=replace(my_checkpoint.experiment.distill, fit=FitConfig(2, 8)),
    calibration=CalibrationSettings(num_pictures=66, num_bands=1, batch_size=33, num_depths=1),
    calibration_steps=2,
    full_steps=(1, 2),
    dynamic_steps=(2,),
    unguided_steps=(2,),
    budgets=(0.7, 0.9),
    num_blocks=2,
)
COMMON = ["--extractor", "digits", "--num-images", "66"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, and the recipe with fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(my_checkpoint, "experiment", SMALL)
    monkeypatch.setattr("dyndit.calibration.samplers.measure_cost", partial(fixed_cost, num_blocks=6))
    data = load_digits()
    for index, array in enumerate(data.uint8(range(70))[:, 0].numpy()):
        folder = tmp_path / "pictures" / f"class-{data[index][1]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{index:03d}.png")
    return tmp_path


def without_exits(model: dyndit.DynamicDepth, folder: Path, **changes: object) -> Path:
    dyndit.DynamicDepth(model.backbone, **changes).save_pretrained(folder)
    return folder


def checked(run: Path, solver: str) -> None:
    runs = read_runs(run)
    assert set(runs["family"]) == {"full", "unguided", "searched"}
    assert set(runs["solver"]) == {solver}
    assert runs[["fd", "kid", "precision", "recall", "macs_heads"]].notna().all(axis=None)
    assert verify(run) == []


def test_a_checkpoint_without_exits_gets_all_of_it(here: Path, make_model: MakeModel, capsys) -> None:
    convert(str(without_exits(make_model(), here / "native")), here / "my-dit.pt", "official")
    main(["compare", "--model", "my-dit.pt", "--data", "pictures/", "--num-heads", "2", *COMMON])
    run = here / "runs" / "compare"
    checked(run, "ddim")
    made = dyndit.load(run / "model")
    assert made.identity.backbone == dyndit.load("my-dit.pt", num_heads=2).identity.backbone
    assert made.depths == (1, 2, 3, 4, 5, 6)
    printed = " ".join(capsys.readouterr().out.split())
    assert "of the time is saved at unchanged quality" in printed or "no plan is shown to keep" in printed.lower()
    assert "one calibration." in (run / "report.md").read_text()


def test_a_flow_runs_its_own_solver(here: Path, make_model: MakeModel) -> None:
    folder = without_exits(make_model(), here / "flow", process=RectifiedFlow())
    main(["compare", "--model", str(folder), "--data", "digits", "--out", str(here / "run"), *COMMON])
    checked(here / "run", "flow-euler")


def test_exits_that_are_there_are_kept(here: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model((2, 4))
    model.save_pretrained(here / "mine")
    monkeypatch.setattr("dyndit.training.match.fit", None)
    main(["compare", "--model", str(here / "mine"), "--data", "pictures", "--out", str(here / "run"), *COMMON])
    assert dyndit.load(here / "run" / "model").identity.exits == model.identity.exits


def test_latents_are_judged_as_pictures(here: Path, make_model: MakeModel) -> None:
    vae = make_autoencoder(here / "vae")
    model = make_model(image_size=4, patch_size=2, in_channels=4)
    folder = without_exits(model, here / "latent", pixel_space=False)
    main(
        [
            "compare",
            "--model",
            str(folder),
            "--data",
            "pictures",
            "--vae",
            str(vae),
            "--out",
            str(here / "run"),
            *COMMON,
        ]
    )
    checked(here / "run", "ddim")
    assert (here / "run" / "samples.png").exists()


def test_one_seed_of_two_sets_is_no_verdict_but_a_picture(here: Path, make_model: MakeModel, capsys) -> None:
    """The documents' verdict block with one seed: sample, sample, evaluate, evaluate, report."""
    make_model((2, 4)).save_pretrained(here / "mine")
    for name, more in (("full-0", []), ("dynamic-0", ["--router", "ramp:2"])):
        main(["sample", "mine", "--steps", "2", "--num-images", "66", "--out", name, *more])
        main(["evaluate", name, "--reference", "pictures", "--extractor", "digits", "--out", "verdict"])
    main(["report", "verdict"])
    printed = " ".join(capsys.readouterr().out.split()).lower()
    assert "one seed block: no verdict, draw more" in printed
    text = (here / "verdict" / "report.md").read_text()
    assert "](side-by-side.png)" in text
    assert "**One seed block: no verdict, draw more.**" in text
    assert verify(here / "verdict") == []


REFUSED: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda root: ["--model", str(root / "native")], "--data: missing; expected a folder of pictures"),
    (lambda root: ["--data", "digits"], "--model: missing; expected a checkpoint"),
    (lambda root: ["--model", str(root / "none"), "--data", "digits"], "none: no such file or folder"),
    (lambda root: ["--model", str(root / "native"), "--data", "digits", "--num-images", "0"], "--num-images 0"),
    (lambda root: ["--model", str(root / "latent"), "--data", "digits"], "--vae: missing"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_missing_is_said_before_anything_is_written(
    arguments: Callable[[Path], list[str]], message: str, here: Path, make_model: MakeModel, capsys
) -> None:
    without_exits(make_model(), here / "native")
    without_exits(make_model(image_size=4, patch_size=2, in_channels=4), here / "latent", pixel_space=False)
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments(here), "--extractor", "digits"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_budget_that_no_plan_meets_is_left_out(here: Path, make_model: MakeModel, capsys) -> None:
    my_checkpoint.experiment = replace(SMALL, budgets=(0.05, 0.9))
    make_model((2, 4)).save_pretrained(here / "mine")
    main(["compare", "--model", "mine", "--data", "digits", *COMMON])
    assert "no plan within 0.05: the cheapest plan takes 0." in " ".join(capsys.readouterr().err.split())
    runs = read_runs(here / "runs" / "compare")
    assert set(runs[runs["family"] == "searched"]["budget"]) == {0.9}
