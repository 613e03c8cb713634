"""Every family through the same verbs: train, distill, calibrate, sample, evaluate, report, and a whole comparison.

Families are found by their quickstarts: a recipe in dyndit.recipes with `train`, `distill` and `quickstart`. Each is
made small here, in its width and its updates, and keeps its process, its data, its heads and its extractor.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import dyndit
from dyndit.analysis import read_runs
from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.report.verify import verify
from dyndit.calibration import samplers
from dyndit.cli import main
from dyndit.cli.recipes import find, quickstarts
from dyndit.models import families
from support.tiny_verbs import fixed_cost

pytestmark = pytest.mark.usefixtures("quick_search")

SMALL = """
from dataclasses import replace

from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes import {recipe} as whole


def short(recipe, **changes):
    return replace(recipe, fit=replace(recipe.fit, steps=2, batch_size=8, log_every=1), **changes)


train = short(whole.train, backbone=replace(whole.train.backbone, width=24, num_blocks=3, num_heads=2))
distill = short(whole.distill)
experiment = replace(
    whole.quickstart, model="", train=train, distill=distill, calibration_steps=2, full_steps=(1, 2), full_points=(),
    calibration=CalibrationSettings(num_pictures=80, num_bands=2, batch_size=40, num_depths=2), dynamic_steps=(2,),
    budgets=(0.9,), num_blocks=2, num_images=80, batch_size=40,
)
"""


@pytest.fixture(params=quickstarts().items(), ids=list(quickstarts()))
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Experiment]:
    """The small recipe of a family, in an empty folder, and its quickstart."""
    monkeypatch.setattr(samplers, "measure_cost", fixed_cost)
    monkeypatch.setattr(Figure, "savefig", lambda _self, to, **_: getattr(to, "write_bytes", bytes)(b"drawn"))
    monkeypatch.setattr("dyndit.pictures.clips.find_spec", lambda name: None)  # GIF alone: 64 MP4 files take seconds
    _, recipe = request.param
    path = tmp_path / "recipe.py"
    path.write_text(SMALL.format(recipe=recipe))
    return path, find(recipe, "quickstart", Experiment)


def test_every_family_has_a_quickstart() -> None:
    """A new file in dyndit/models gets a recipe, so that it is trained and measured as the others are."""
    found = {type(find(recipe, "quickstart", Experiment).train.outline()).family for recipe in quickstarts().values()}
    assert found == families().keys()


def test_the_verbs(small: tuple[Path, Experiment], capsys: pytest.CaptureFixture) -> None:
    recipe, whole = small
    place = {name: str(recipe.parent / name) for name in ("backbone", "model", "samples", "run", "report")}
    main(["train", str(recipe), "--out", place["backbone"]])
    main(["distill", str(recipe), "--model", place["backbone"], "--out", place["model"]])
    table = ["--num-pictures", "80", "--table-steps", "2", "--num-bands", "2", "--num-depths", "2"]
    plan = ["--budget", "0.9", "--steps", "2"]
    main(["calibrate", place["model"], *plan, *table, "--extractor", whole.extractor, "--reference", whole.data])
    main(["sample", place["model"], "--dynamic", *plan, "--num-images", "80", "--out", place["samples"]])
    judged = ["--reference", whole.data, "--extractor", whole.extractor, "--metrics", "fd"]
    capsys.readouterr()
    main(["evaluate", place["samples"], *judged, "--out", place["run"], "--json"])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["num_samples"] == 80
    main(["report", place["run"], "--out", place["report"]])
    assert verify(Path(place["report"])) == []
    model, row = dyndit.load(place["model"]), read_runs(Path(place["run"])).iloc[0]
    assert model.depths == (1, 2, 3)
    assert model.identity.backbone == dyndit.load(place["backbone"]).identity.backbone
    assert (row["family"], row["budget"], row["solver"]) == ("searched", 0.9, model.process.usual_solver)
    assert 0 < row["share_of_blocks"] < 1


def test_a_whole_comparison(small: tuple[Path, Experiment]) -> None:
    recipe, whole = small
    out = recipe.parent / "run"
    main(["compare", str(recipe), "--from-scratch", "--out", str(out)])
    runs, solver = read_runs(out), whole.solvers[0]
    assert {f"full-{solver}-1", f"full-{solver}-2", f"searched-{solver}-2-b0.9"} <= set(runs["arm"])
    assert verify(out) == []
    costs = pd.read_csv(out / "trainings.csv").set_index("name")
    assert list(costs.index) == ["backbone", "exits", "table"]
    assert (costs["seconds"] > 0).all()
    assert costs.loc["backbone", "training_flops"] == 6 * costs.loc["backbone", "macs"] * 16
