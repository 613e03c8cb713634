"""The routers beyond the table, as arms of a comparison."""

from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from dyndit.analysis.compare.arms import Preparation
from dyndit.analysis.compare.experiment import Experiment, Inputs, Variant, settings_of
from dyndit.analysis.compare.peers.confidence import ConfidenceSettings, Thresholds
from dyndit.analysis.compare.run import Comparison
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.calibration.calibrate import CalibrationSettings
from dyndit.plans.learned import LearnedSettings
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill


@pytest.fixture(scope="module")
def making(make_model, tmp_path_factory):
    experiment = Experiment(
        model="", data="digits", extractor="digits", distill=Distill(), solvers=("ddim",), dynamic_steps=(3,),
        calibration=CalibrationSettings(70, 2, 70, pairs=((2, 2), (4, 4), (2, 0))), calibration_steps=3,
        budgets=(0.5, 0.8), learned=LearnedSettings(iterations=5, width=8),
        confidence=ConfidenceSettings((0.0, 1e9), (1, 2, 4), num_pictures=30),
        num_blocks=1, num_images=70, batch_size=35,
    )  # fmt: skip
    real = PictureSet("digits", load_digits().uint8()[:300])
    judges = (Measured(real, load_extractor("digits")),)
    out = tmp_path_factory.mktemp("comparison")
    return Preparation(experiment, make_model(), judges, out, Console(quiet=True))


def test_both_routers_are_measured_beside_the_rest(making, monkeypatch) -> None:
    table = making.table()
    arms = [*making.learned(table), *making.confidence()]
    assert [arm.name for arm in arms] == [
        "learned-ddim-3-b0.5", "learned-ddim-3-b0.8", "confidence-ddim-3-e0", "confidence-ddim-3-e1e+09",
    ]  # fmt: skip
    assert all(table.cost.share_of_time(arm.plan) <= arm.budget * (1 + 1e-6) for arm in arms[:2])
    assert all(arm.predicted_fd > 0 and arm.predicted_ms > 0 for arm in arms[:2])
    monkeypatch.setattr("dyndit.analysis.compare.arms.train_router", None)  # a run that goes on finds router and plans
    monkeypatch.setattr("dyndit.analysis.compare.arms.Predictor", None)
    assert making.learned(table) == arms[:2]

    Comparison(making.experiment, making.model, making.judges, making.out, making.console).measure(arms)
    rows = pd.read_csv(making.out / "runs.csv").set_index("arm")
    shares = rows["share_of_blocks"]
    assert shares["learned-ddim-3-b0.5"] == pytest.approx(arms[0].plan.share_of_blocks)
    assert shares["confidence-ddim-3-e0"] == 1
    assert 2 / 6 <= shares["confidence-ddim-3-e1e+09"] < 0.5
    early, never = rows.loc["confidence-ddim-3-e1e+09"], rows.loc["confidence-ddim-3-e0"]
    assert early["mean_depth_cond"] == early["mean_depth_uncond"] == pytest.approx(6 * early["share_of_blocks"])
    assert early["macs"] < 0.6 * never["macs"]  # counted at what ran
    assert pd.isna(early["predicted_ms"])

    decided = pd.read_csv(making.out / "confidence.csv")
    assert decided.groupby("arm").size().to_dict() == dict.fromkeys([arm.name for arm in arms[2:]], 3)
    assert Thresholds.load(making.out / "thresholds-e0.json").target == 0


def test_a_comparison_without_them_is_the_run_it_was(making) -> None:
    def settings(experiment: Experiment) -> dict:
        return settings_of(experiment, Inputs(), load_digits())["experiment"]

    neither = replace(making.experiment, learned=None, confidence=None)
    assert not {"learned", "confidence"} & settings(neither).keys()
    assert {"learned", "confidence"} <= settings(making.experiment).keys()
    assert not replace(making, experiment=neither).learned(None)
    assert not replace(making, experiment=neither).confidence()


def test_a_comparison_without_second_order_terms_is_the_run_it_was(making) -> None:
    def settings(*, of: bool, variant: bool) -> tuple[dict, dict, None]:
        base, other = (replace(making.experiment.calibration, second_order=asked) for asked in (of, variant))
        variants = (Variant("a", calibration=other), Variant("b"))
        experiment = replace(making.experiment, calibration=base, variants=variants)
        chosen = settings_of(experiment, Inputs(), load_digits())["experiment"]
        return (chosen["calibration"], *(held["calibration"] for held in chosen["variants"]))

    for of in (False, True):
        for variant in (False, True):
            base, other, none = settings(of=of, variant=variant)
            assert ("second_order" in base, "second_order" in other, none) == (of, variant, None)
            assert base["num_bands"] == other["num_bands"]


def test_the_recipe_of_levers_measures_both() -> None:
    from dyndit.recipes.digits_levers import experiment

    assert experiment.learned is not None
    assert experiment.confidence is not None
