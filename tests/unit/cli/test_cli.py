"""The command line from end to end on a tiny model: every verb, the JSON line, and bad input."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

import dyndit
from dyndit.analysis.metrics.metric import metrics_by_name
from dyndit.calibration import samplers
from dyndit.cli import VERBS, main
from dyndit.errors import CheckpointError
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.step import Held
from dyndit.plans.table import ShiftTable
from dyndit.sampling.solvers import SOLVERS
from support.autoencoders import make_autoencoder

RECIPE = """
from dyndit.models.dit import DiTConfig
from dyndit.calibration.calibrate import CalibrationSettings
from dyndit.models.exits import ExitConfig
from dyndit.analysis.compare.experiment import Controls, Experiment, Variant
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train
from dyndit.training.fit import FitConfig

train = Train(
    backbone=DiTConfig(8, 4, 1, width=32, num_blocks=4, num_heads=2, num_classes=10),
    data="digits",
    fit=FitConfig(steps=30, batch_size=32, learning_rate=3e-3, ema_decay=0.9),
)
distill = Distill(ExitConfig(), FitConfig(steps=20, batch_size=32, learning_rate=3e-3, ema_decay=0.9), "digits")
experiment = Experiment(
    model="", data="digits", extractor="digits", train=train, distill=distill,
    calibration=CalibrationSettings(num_pictures=80, num_bands=2, batch_size=40), calibration_steps=4,
    full_steps=(2, 3, 4), dynamic_steps=(4,), budgets=(0.6, 0.8, 0.95), solvers=("ddim",),
    full_solvers=("dpmpp", "ddpm"), latency_budgets=(0.6,), latency_reference_steps=4, latency_steps=(2, 3),
    controls=Controls("ddim", 4, (2,), num_ramps=2), num_blocks=2, num_images=70, batch_size=35,
    variants=(
        Variant("held", calibration=CalibrationSettings(80, 2, 40, num_depths=2, held=True)),
        Variant("wide", distill=Distill(ExitConfig((2,), "wide"), distill.fit, "digits")),
        Variant("elsewhere", calibration_solver="unipc", calibration_steps=3, calibration_cfg_scale=3.0),
        Variant("whole", distill=Distill(ExitConfig((2,)), distill.fit, "digits", backbone="whole")),
    ),
)
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a recipe, a trained backbone `backbone`, a model with exits `model`, a table and a plan in it."""
    root = tmp_path_factory.mktemp("workshop")
    recipe = root / "recipe.py"
    recipe.write_text(RECIPE)
    main(["train", str(recipe), "--out", str(root / "trunk")])
    main(["distill", str(recipe), "--model", str(root / "trunk"), "--out", str(root / "model")])
    common = ["--steps", "4", "--num-pictures", "80", "--table-steps", "4", "--num-bands", "2"]
    with pytest.MonkeyPatch.context() as patch:  # a budget is in reach however busy the machine is
        parts = PartTimes(1e-4, 1e-3, 1e-4, 1e-4)
        cost = partial(CostModel, num_blocks=4, one=parts, two=replace(parts, block=1.9e-3), solver=1e-4)
        patch.setattr(samplers, "measure_cost", lambda _, batch_size, **__: cost(batch_size))
        main(["calibrate", str(root / "model"), "--budget", "0.6", *common, "--out", str(root / "plan.json")])
    return root


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_training_leaves_a_model_and_its_record(workshop: Path) -> None:
    model = dyndit.load(workshop / "trunk")
    assert model.depths == (4,)
    assert (workshop / "trunk" / "losses.csv").exists()
    manifest = json.loads((workshop / "trunk" / "manifest.json").read_text())
    assert manifest["fit"]["steps"] == 30
    assert "torch" in manifest["versions"]


def test_distillation_leaves_the_trunk_alone(workshop: Path) -> None:
    before, after = dyndit.load(workshop / "trunk"), dyndit.load(workshop / "model")
    assert before.identity.backbone == after.identity.backbone
    assert after.depths == (1, 2, 3, 4)
    assert (workshop / "model" / "exit-errors.csv").exists()


def test_another_budget_needs_no_new_table(workshop: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dyndit.calibration.calibrate.measure_shifts", None)
    out = workshop / "plan-08.json"
    main(["calibrate", str(workshop / "model"), "--budget", "0.8", "--steps", "6", "--out", str(out), "--json"])
    figures = last_json(capsys)
    assert figures["predicted_share_of_time"] <= 0.8
    assert figures["measured_fd"] > 0
    plan = dyndit.DepthPlan.load(out)
    assert plan.num_steps == 6
    assert plan.figures["predicted_fd"] == figures["predicted_fd"]


@pytest.mark.usefixtures("quick_search")
def test_steps_are_chosen_for_a_time_or_a_distance(workshop: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import shutil

    monkeypatch.setattr("dyndit.calibration.calibrate.measure_shifts", None)  # the table is there
    model = tmp_path / "model"
    shutil.copytree(workshop / "model", model)
    goal = ["--latency-budget", "0.6", "--reference-steps", "4"]
    main(["calibrate", str(model), *goal, "--step-grid", "2", "--json"])
    text = capsys.readouterr().out
    figures = json.loads(text.strip().splitlines()[-1])
    assert "within 60.0% of full depth's time at 4 steps" in text
    assert figures["predicted_share_of_reference"] <= 0.6
    assert figures["measured_share_of_reference"] > 0
    plan = dyndit.DepthPlan.load(model / "plan-chosen-ddim-b0.6-of4.json")
    assert figures["plan"] == str(model / "plan-chosen-ddim-b0.6-of4.json")
    assert ShiftTable.load(model / "shift-table.safetensors").step_counts("ddim") == (2, 4)
    draw = ["sample", str(model), "--num-images", "2", "--json"]
    main([*draw, "--dynamic", *goal, "--out", str(tmp_path / "quick")])
    drawn = last_json(capsys)
    assert (drawn["steps"], drawn["share_of_blocks"]) == (plan.num_steps, plan.share_of_blocks)
    target = 1.2 * figures["predicted_fd"]
    main([*draw, "--target-fd", str(target), "--out", str(tmp_path / "good")])
    assert last_json(capsys)["steps"] in (2, 4)
    manifest = json.loads((tmp_path / "good" / "manifest.json").read_text())
    assert manifest["plan"]["predicted_fd"] <= target


def test_sample_writes_pictures_grid_archive_and_manifest(workshop: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "samples"
    arguments = ["sample", str(workshop / "model"), "--out", str(out), "--num-images", "5", "--steps", "4"]
    choice = ["--class-labels", "3", "7", "--dynamic", "--plan", str(workshop / "plan.json"), "--stats", "--json"]
    main([*arguments, *choice])
    text = capsys.readouterr().out
    figures = json.loads(text.strip().splitlines()[-1])
    assert figures["num_images"] == 5
    assert figures["share_of_blocks"] < 0.9
    assert "runs" in text
    names = sorted(p.name for p in out.iterdir())
    assert names == [
        *(f"{i:06d}-class{c}.png" for i, c in enumerate((3, 7, 3, 7, 3))),
        "grid.png",
        "manifest.json",
        "samples.npz",
    ]
    archive = np.load(out / "samples.npz")["arr_0"]
    assert archive.shape == (5, 8, 8, 1)
    assert np.array_equal(np.asarray(Image.open(out / "000003-class7.png")), archive[3, ..., 0])
    main([*arguments, *choice])  # the same run again is no other run
    assert "5 of 5 pictures were there already" in capsys.readouterr().out


def test_a_killed_sampling_goes_on(workshop: Path, tmp_path: Path, capsys) -> None:
    def draw(name: str) -> list[str]:
        shape = ["--num-images", "160", "--batch-size", "4", "--steps", "4"]
        return ["sample", str(workshop / "trunk"), *shape, "--out", str(tmp_path / name)]

    with subprocess.Popen([sys.executable, "-m", "dyndit", *draw("killed")]) as process:
        while len(list((tmp_path / "killed").glob("*.png"))) < 10:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    there = len(list((tmp_path / "killed").glob("*.png")))
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "killed"), "--reference", "digits", "--extractor", "digits"])
    assert f"unfinished, {there} of 160 pictures" in capsys.readouterr().err
    main(draw("killed"))
    assert f"{there} of 160 pictures were there already" in capsys.readouterr().out
    main(draw("undisturbed"))
    folders = [tmp_path / name for name in ("killed", "undisturbed")]
    found = [{p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".json"} for folder in folders]
    assert found[0] == found[1]
    assert len(found[0]) == 162


def test_budget_flag_searches_on_the_stored_table(workshop: Path, tmp_path: Path, capsys) -> None:
    arguments = ["sample", str(workshop / "model"), "--num-images", "2", "--steps", "8", "--solver", "unipc", "--json"]
    main([*arguments, "--dynamic", "--budget", "0.5", "--out", str(tmp_path / "half")])
    half = last_json(capsys)
    main([*arguments, "--out", str(tmp_path / "full")])
    assert half["share_of_blocks"] < 0.75 < last_json(capsys)["share_of_blocks"] == 1.0


def test_evaluate(workshop: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "samples"
    main(["sample", str(workshop / "model"), "--out", str(out), "--num-images", "80", "--steps", "2"])
    capsys.readouterr()
    for source in (out, out / "samples.npz"):
        main(["evaluate", str(source), "--reference", "digits", "--extractor", "digits", "--json"])
    figures = last_json(capsys)
    assert figures["metric"] == "FD-digits"
    assert {"fd", "kid", "is", "precision", "recall"} <= figures.keys()


def test_samples_become_a_report(workshop: Path, tmp_path: Path, capsys) -> None:
    """sample, evaluate, report: the chain for any model, without `compare`."""
    arms = {"full": [], "half": ["--budget", "0.6"]}
    for seed in ("0", "1"):
        for arm, choice in arms.items():
            out = str(tmp_path / f"{arm}-{seed}")
            draw = ["--num-images", "70", "--steps", "4", "--seed", seed, *choice]
            main(["sample", str(workshop / "model"), *draw, "--out", out])
            score = ["--reference", "digits", "--extractor", "digits", "--metrics", "fd"]
            main(["evaluate", out, *score, "--out", str(tmp_path / "run")])
    runs = dyndit.analysis.read_runs(tmp_path / "run")
    assert sorted(set(runs["arm"])) == ["full-ddim-4", "searched-ddim-4-b0.6"]
    assert sorted(runs["block"]) == [0, 0, 1, 1]
    main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    assert "searched-ddim-4-b0.6" in (tmp_path / "report" / "report.md").read_text()


def test_distillation_saves_a_trunk_that_it_trained(workshop: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE + "\nfrom dataclasses import replace\ndistill = replace(distill, backbone='lora')\n")
    options = ["--model", str(workshop / "trunk"), "--steps", "2"]
    main(["distill", str(recipe), *options, "--out", str(tmp_path / "out")])
    found = dyndit.load(tmp_path / "out").identity.backbone
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["trunk"] == found
    assert found != dyndit.load(workshop / "trunk").identity.backbone
    assert "backbone: trained too" in capsys.readouterr().out


def test_bench_times_full_depth_against_itself(workshop: Path, capsys, tmp_path: Path) -> None:
    plan = ["--plan", str(workshop / "plan.json"), "--steps", "4", "--rounds", "3", "--until", "0"]
    options = ["--batch-size", "2", "8", "--out", str(tmp_path / "t.csv"), "--json"]
    main(["bench", str(workshop / "model"), *plan, *options])
    figures = last_json(capsys)
    assert {(row["batch_size"], row["scope"], row["arm"]) for row in figures["arms"]} == {
        (size, scope, arm)
        for size in (2, 8)
        for scope in ("denoiser", "noise to uint8")
        for arm in ("full", "full again", "searched")
    }
    assert all(row["ms"] > 0 and row["macs"] > 0 for row in figures["arms"])
    assert (figures["dtype"], figures["device"], figures["compiled"]) == ("float32", "cpu", "eager")
    assert (tmp_path / "t.csv").read_text().count("\n") == 1 + 2 * 3 * 3 * 2


def test_convert_then_load(workshop: Path, tmp_path: Path) -> None:
    import torch

    torch.save(dyndit.load(workshop / "trunk").backbone.state_dict(), tmp_path / "dit.pt")
    main(["convert", str(tmp_path / "dit.pt"), str(tmp_path / "native"), "--num-heads", "2"])
    assert dyndit.load(tmp_path / "native").identity.backbone == dyndit.load(workshop / "trunk").identity.backbone


@pytest.mark.usefixtures("quick_search")
def test_compare_from_trunk_to_report_and_again(workshop: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "run"
    arguments = ["compare", str(workshop / "recipe.py"), "--out", str(out), "--model", str(workshop / "trunk")]
    main([*arguments, "--json"])
    result = last_json(capsys)
    arms = {row["arm"] for row in result["arms"]}
    assert {"full-ddim-4", "full-dpmpp-4", "full-ddpm-4", "searched-ddim-4-b0.6"} < arms
    assert not any("dpmpp" in arm or "ddpm" in arm for arm in arms if not arm.startswith("full"))
    assert any(arm.startswith("reversed-ddim-4-") for arm in arms)
    assert sum(arm.startswith("ramp") for arm in arms) == 2
    chosen = dyndit.DepthPlan.load(out / "plan-chosen-ddim-b0.6.json")
    assert f"chosen-ddim-{chosen.num_steps}-b0.6" in arms
    assert chosen.num_steps in (2, 3, 4)
    assert chosen.figures["predicted_share_of_reference"] <= 0.6
    assert ShiftTable.load(out / "model" / "shift-table.safetensors").step_counts("ddim") == (2, 3, 4)
    assert {"searched-held-ddim-4-b0.95", "searched-wide-ddim-4-b0.95"} < arms
    variants = out / "variants"
    assert dyndit.load(variants / "wide" / "model").depths == (2, 4)
    backbones = {name: dyndit.load(variants / name / "model").identity.backbone for name in ("wide", "whole")}
    assert backbones["wide"] == dyndit.load(workshop / "trunk").identity.backbone != backbones["whole"]
    assert "searched-whole-ddim-4-b0.95" in arms
    assert sorted(arm for arm in arms if arm.startswith(("full-wide", "full-whole"))) == ["full-whole-ddim-4"]
    assert not (variants / "held" / "model" / "exits.safetensors").exists()  # the comparison's own exits
    held = ShiftTable.load(variants / "held" / "model" / "shift-table.safetensors")
    assert any(isinstance(step.guide, Held) for step in held.choices)
    elsewhere = ShiftTable.load(variants / "elsewhere" / "model" / "shift-table.safetensors")
    assert (elsewhere.solver, elsewhere.num_steps, elsewhere.cfg_scale) == ("unipc", 3, 3.0)
    assert dyndit.DepthPlan.load(variants / "elsewhere" / "plan-ddim-4-b0.95.json").cfg_scale == 1.5
    plans = [dyndit.DepthPlan.load(variants / name / "plan-ddim-4-b0.95.json") for name in ("held", "wide")]
    assert plans[0].exits != plans[1].exits
    for name in ("runs.csv", "report.md", "report.html", "frontier.png", "plan.png", "samples.png", "manifest.json"):
        assert (out / name).stat().st_size > 0, name
    runs = dyndit.analysis.read_runs(out)
    assert runs.groupby("arm").size().eq(2).all()
    assert runs["fd"].notna().all()
    # Again: nothing is distilled, calibrated or sampled for a figure twice.
    before = (out / "runs.csv").read_bytes()
    monkeypatch.setattr("dyndit.analysis.compare.context.measure_shifts", None)
    monkeypatch.setattr("dyndit.analysis.compare.context.measure_bases", None)
    monkeypatch.setattr("dyndit.training.match.fit", None)
    main(arguments)
    assert (out / "runs.csv").read_bytes() == before
    # Interrupted: only what is missing is measured.
    lines = before.decode().splitlines(keepends=True)
    unsealed = [line.rpartition(",")[0] + "\n" for line in lines[:-3]]  # rows removed by hand: without the checksum
    (out / "runs.csv").write_text("".join(unsealed))
    main(arguments)
    again = dyndit.analysis.read_runs(out)
    columns = ["arm", "block", "fd"]
    ordered = [frame[columns].sort_values(columns[:2]).reset_index(drop=True) for frame in (runs, again)]
    assert np.allclose(ordered[0]["fd"], ordered[1]["fd"])
    main(["report", str(out), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.usefixtures("quick_search")
def test_compare_takes_a_model_with_its_exits_and_table(workshop: Path, tmp_path: Path, monkeypatch) -> None:
    """Also in half precision, at one point alone: nothing is distilled or measured, plans come from the table given."""
    recipe = tmp_path / "recipe.py"
    changes = "variants=(), controls=None, latency_budgets=(), points=(('ddim', 4),), precision='bf16', "
    changes += "full_points=(('ddim', 4), ('unipc', 2))"
    recipe.write_text(f"{RECIPE}\nfrom dataclasses import replace\nexperiment = replace(experiment, {changes})\n")
    monkeypatch.setattr("dyndit.analysis.compare.context.measure_shifts", None)
    monkeypatch.setattr("dyndit.training.match.fit", None)
    out = tmp_path / "run"
    main(["compare", str(recipe), "--out", str(out), "--model", str(workshop / "model")])
    tables = [folder / "shift-table.safetensors" for folder in (workshop / "model", out / "model")]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert dyndit.load(out / "model").identity.exits == dyndit.load(workshop / "model").identity.exits
    runs = dyndit.analysis.read_runs(out)
    assert {(row.solver, row.steps) for row in runs[runs["family"] == "searched"].itertuples()} == {("ddim", 4)}
    full = runs[runs["family"] == "full"]
    assert {(row.solver, row.steps) for row in full.itertuples()} == {("ddim", 4), ("unipc", 2)}
    assert set(runs["dtype"]) == {"bf16 autocast"}


LATENT_RECIPE = """
from dyndit.models.dit import DiTConfig
from dyndit.models.exits import ExitConfig
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train
from dyndit.training.fit import FitConfig

fit = FitConfig(steps=3, batch_size=4, learning_rate=1e-3, ema_decay=0.9)
train = Train(DiTConfig(16, 4, 4, width=32, num_blocks=2, num_heads=2, num_classes=2), fit)
distill = Distill(ExitConfig(), fit)
"""


def test_latents_from_pictures_to_pictures(tmp_path: Path) -> None:
    """A picture folder through a tiny random autoencoder: encode, cache, train, distil, sample, decode."""
    autoencoder = make_autoencoder(tmp_path / "vae", in_channels=3, out_channels=3)
    g = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(5):
            picture = Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            picture.save(tmp_path / "pictures" / name / f"{i}.png")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(LATENT_RECIPE)
    common = ["--data", str(tmp_path / "pictures"), "--vae", str(autoencoder)]
    main(["train", str(recipe), *common, "--out", str(tmp_path / "trunk")])
    main(["distill", str(recipe), *common, "--model", str(tmp_path / "trunk"), "--out", str(tmp_path / "model")])
    draw = ["sample", str(tmp_path / "model"), "--num-images", "3", "--steps", "2", "--out", str(tmp_path / "samples")]
    with pytest.raises(SystemExit):
        main(draw)  # latents need their decoder
    main([*draw, "--vae", str(autoencoder)])
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (3, 32, 32, 3)


DIGIT_LATENTS = """
from dyndit.models.dit import DiTConfig
from dyndit.models.exits import ExitConfig
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill
from dyndit.training.train import Train
from dyndit.training.fit import FitConfig

fit = FitConfig(steps=3, batch_size=4, learning_rate=1e-3, ema_decay=0.9)
train = Train(DiTConfig(4, 2, 4, width=32, num_blocks=2, num_heads=2, num_classes=10), fit)
distill = Distill(ExitConfig(), fit)
"""


def test_latents_are_calibrated_on_decoded_pictures(tmp_path: Path, capsys) -> None:
    autoencoder = make_autoencoder(tmp_path / "vae")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(DIGIT_LATENTS)
    vae = ["--vae", str(autoencoder)]
    main(["train", str(recipe), "--data", "digits", *vae, "--out", str(tmp_path / "trunk")])
    model = str(tmp_path / "model")
    main(["distill", str(recipe), "--data", "digits", *vae, "--model", str(tmp_path / "trunk"), "--out", model])
    small = ["--steps", "2", "--table-steps", "2", "--num-bands", "2", "--num-pictures", "70", "--batch-size", "35"]
    measuring = ["--extractor", "digits", "--reference", "digits"]
    main(["calibrate", model, "--budget", "0.9", *small, *measuring, *vae, "--json"])
    assert last_json(capsys)["measured_fd"] > 0
    main(["calibrate", model, "--budget", "0.95", "--steps", "2", *measuring, *vae])
    assert "(70 seeds, 2 bands)" in " ".join(capsys.readouterr().out.split())
    main(["calibrate", model, "--budget", "0.9", "--fresh", "--forecast-ages", "1", *small, *measuring, *vae])
    assert ShiftTable.load(tmp_path / "model" / "shift-table.safetensors").ages[-1] == 1
    out = str(tmp_path / "samples")
    main(["sample", model, "--budget", "0.9", "--steps", "2", "--num-images", "2", *vae, "--out", out])
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (2, 8, 8, 1)


DIGITS = ["--reference", "digits", "--extractor", "digits"]
BAD = [
    (["sample", "{model}", "--out", "{out}", "--class-labels", "12"], "--class-labels 12"),
    (["sample", "{model}", "--out", "{out}", "--solver", "magic"], "--solver magic"),
    (["sample", "{model}", "--out", "{out}", "--steps", "0"], "--steps 0"),
    (["sample", "{model}", "--out", "{out}", "--num-images", "0"], "--num-images 0"),
    (["sample", "{model}", "--out", "{out}", "--budget", "1.5"], "--budget 1.5"),
    (["sample", "{model}", "--out", "{out}", "--plan", "{plan}", "--steps", "5"], "plan.json"),
    (["sample", "{backbone}", "--out", "{out}", "--plan", "{plan}", "--steps", "4"], "plan.json"),
    (["sample", "{backbone}", "--out", "{out}", "--budget", "0.5"], "shift-table"),
    (["sample", "{root}/none", "--out", "{out}"], "none"),
    (["sample", "{damaged}", "--out", "{out}"], "model.safetensors"),
    (["sample", "{foreign}", "--out", "{out}"], "exits.safetensors"),
    (["sample", "{model}", "--out", "{full}"], "--out"),
    (["sample", "{model}", "--out", "{out}", "--seed", "-1"], "--seed -1"),
    (["sample", "{model}", "--out", "{out}", "--device", "quantum"], "--device quantum"),
    (["sample", "{model}", "--out", "{out}", "--dtype", "float7"], "--dtype float7"),
    (["sample", "{model}", "--out", "{out}", "--router", "magic:3"], "--router magic"),
    (["sample", "{model}", "--out", "{out}", "--budget", "0.5", "--cfg-scale", "4"], "--cfg-scale 4"),
    (["bench", "{model}", "--budget", "0.5", "--cfg-scale", "1"], "--cfg-scale 1"),
    (["bench", "{model}", "--rounds", "0"], "--rounds 0"),
    (["bench", "{model}", "--batch-size", "8", "0"], "--batch-size 0"),
    (["bench", "{model}", "--until", "-1"], "--until -1"),
    (["bench", "{model}", "--rounds", "9", "--max-rounds", "3"], "--max-rounds 3"),
    (["bench", "{model}", "--vae", "{root}/none"], "--vae"),
    (["bench", "{model}", "--out", "{full}"], "--out"),
    (["bench"], "MODEL"),
    (["evaluate", "{unreadable}", "--reference", "digits", "--extractor", "digits"], "broken.png"),
    (["calibrate", "{model}", "--budget", "0"], "--budget 0"),
    (["calibrate", "{model}", "--budget", "0.5", "--solver", "magic"], "--solver magic"),
    (["calibrate", "{backbone}", "--budget", "0.5"], "no exits"),
    (["calibrate", "{model}"], "--latency-budget and --target-fd"),
    (["calibrate", "{model}", "--budget", "0.5", "--forecast-ages", "-1"], "--forecast-ages -1"),
    (["calibrate", "{model}", "--budget", "0.5", "--target-fd", "2"], "--target-fd and --budget: both given"),
    (["calibrate", "{model}", "--latency-budget", "0.5", "--target-fd", "2"], "both given"),
    (["calibrate", "{model}", "--latency-budget", "0.5", "--steps", "10"], "--steps 10"),
    (["calibrate", "{model}", "--latency-budget", "25"], "--latency-budget 25"),
    (["calibrate", "{model}", "--budget", "0.5", "--reference-steps", "20"], "--reference-steps 20"),
    (["calibrate", "{model}", "--budget", "0.5", "--step-grid", "5", "0"], "--step-grid 0"),
    (["sample", "{model}", "--out", "{out}", "--latency-budget", "0.5", "--plan", "{plan}"], "both given"),
    (["sample", "{model}", "--out", "{out}", "--latency-budget", "0.5", "--solver", "unipc"], "--solver unipc"),
    (["sample", "{model}", "--out", "{out}", "--latency-budget", "0.5", "--steps", "4"], "--steps 4"),
    (["sample", "{model}", "--out", "{out}", "--latency-budget", "0.5", "--cfg-scale", "4"], "--cfg-scale 4"),
    (["sample", "{model}", "--out", "{out}", "--target-fd", "1e-9"], "--target-fd 1e-09"),
    (["sample", "{backbone}", "--out", "{out}", "--latency-budget", "0.5"], "shift-table"),
    (["distill", "{recipe}", "--model", "{backbone}", "--data", "{empty}", "--out", "{out}"], "empty"),
    (["distill", "{recipe}", "--model", "{backbone}", "--data", "{unreadable}", "--out", "{out}"], "broken.png"),
    (["distill", "{recipe}", "--model", "{backbone}", "--out", "{full}"], "--out"),
    (["train", "{recipe}", "--out", "{full}"], "--out"),
    (["train", "nothing.py", "--out", "{out}"], "nothing.py"),
    (["train", "cifar10", "--out", "{out}"], "--data"),
    (["train", "cifar10", "--data", "digits", "--out", "{out}"], "data"),
    (["evaluate", "{empty}", "--reference", "digits", "--extractor", "digits"], "empty"),
    (["evaluate", "{full}", "--reference", "digits", "--extractor", "magic"], "magic"),
    (["evaluate", "{digits}", *DIGITS, "--metrics", "fd", "--force", "--out", "{out}"], "--out"),
    (["report", "{empty}", "--out", "{out}"], "runs.csv"),
    (["compare", "{recipe}", "--out", "{full}", "--model", "{backbone}"], "--out"),
    (["calibrate", "{root}/none", "--budget", "0.5"], "local model folder"),
    (["convert", "{backbone}", "{full}"], "already there"),
    (["convert", "{backbone}", "{out}", "--num-heads", "4"], "--num-heads 4"),
    (["convert", "{backbone}", "{out}", "--revision", "main"], "--revision main"),
    (["convert", "{damaged}", "{out}", "--to", "official"], "model.safetensors"),
    (["convert", "{foreign}", "{out}", "--to", "diffusers"], "exits.safetensors"),
]


@pytest.fixture(scope="module")
def places(workshop: Path, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bad")
    import shutil

    for name in ("damaged", "foreign"):
        shutil.copytree(workshop / "model", root / name)
    weights = root / "damaged" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 0x40
    weights.write_bytes(content)
    other = dyndit.load(workshop / "model")
    other.backbone.final_layer.linear.bias.data += 1
    other.exits = None
    other.save_pretrained(root / "foreign")
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "notes.txt").write_text("mine")
    broken = root / "unreadable" / "a"
    broken.mkdir(parents=True)
    (broken / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (root / "digits").mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8), 40 * i, dtype=np.uint8)).save(root / "digits" / f"{i}.png")
    made = {name: root / name for name in ("damaged", "foreign", "empty", "full", "unreadable", "digits")}
    return made | {
        "root": root,
        "model": workshop / "model",
        "backbone": workshop / "trunk",
        "plan": workshop / "plan.json",
        "recipe": workshop / "recipe.py",
    }


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_bad_input_is_one_line_and_status_2(
    places: dict[str, Path], tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    filled = [a.format(**places, out=out) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(filled)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dyndit: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(out.glob("**/*.png"))
    assert not (out / "manifest.json").exists(), "a refused run must not claim its folder"
    assert (places["full"] / "notes.txt").read_text() == "mine"


def test_debug_shows_the_traceback(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        main(["sample", str(places["root"] / "none"), "--out", str(tmp_path / "out"), "--debug"])


def test_help_is_quick_and_names_every_verb() -> None:
    """`--help` must not import torch: the check is on modules, not on time."""
    code = (
        "import sys\nfrom dyndit.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_leaves_no_placeholder(verb: str, capsys) -> None:
    for part in vars(tyro._docstrings).values():  # a process has one command, and tyro remembers texts that it read
        if hasattr(part, "cache_clear"):
            part.cache_clear()
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert not re.search(r"\{[a-z]+\}", capsys.readouterr().out)


def test_help_names_what_the_registries_hold(capsys) -> None:
    for arguments, names in ((["sample", "--help"], SOLVERS), (["evaluate", "--help"], metrics_by_name())):
        with pytest.raises(SystemExit):
            main(arguments)
        text = capsys.readouterr().out
        assert all(name in text for name in names)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"dyndit {dyndit.__version__}\n"
