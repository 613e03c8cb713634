"""The confidence router as arms of a comparison."""

import pandas as pd
import pytest
from rich.console import Console

from dyndit.analysis.compare.arms import Preparation
from dyndit.analysis.compare.experiment import Experiment
from dyndit.analysis.compare.peers.confidence import ConfidenceSettings, Thresholds
from dyndit.analysis.compare.run import Comparison
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.calibration.measure import CalibrationSettings
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill


@pytest.fixture(scope="module")
def making(make_model, tmp_path_factory):
    experiment = Experiment(
        model="", data="digits", extractor="digits", distill=Distill(), solvers=("ddim",), dynamic_steps=(3,),
        calibration=CalibrationSettings(70, 2, 70, choices=("2|2", "4|4", "2")), calibration_steps=3,
        budgets=(0.5, 0.8),
        confidence=ConfidenceSettings((0.0, 1e9), (1, 2, 4), num_pictures=30),
        num_blocks=1, num_images=70, batch_size=35,
    )  # fmt: skip
    real = PictureSet("digits", load_digits().uint8()[:300])
    judges = (Measured(real, load_extractor("digits")),)
    out = tmp_path_factory.mktemp("comparison")
    return Preparation(experiment, make_model(), judges, out, Console(quiet=True))


def test_the_confidence_router_is_measured_beside_the_rest(making) -> None:
    table = making.table()
    arms = making.confidence()
    assert [arm.name for arm in arms] == ["confidence-ddim-3-e0", "confidence-ddim-3-e1e+09"]
    assert table.num_bands == 2

    Comparison(making.experiment, making.model, making.judges, making.out, making.console).measure(arms)
    rows = pd.read_csv(making.out / "runs.csv").set_index("arm")
    shares = rows["share_of_blocks"]
    assert shares["confidence-ddim-3-e0"] == 1
    assert 2 / 6 <= shares["confidence-ddim-3-e1e+09"] < 0.5
    early, never = rows.loc["confidence-ddim-3-e1e+09"], rows.loc["confidence-ddim-3-e0"]
    assert early["mean_depth_cond"] == early["mean_depth_uncond"] == pytest.approx(6 * early["share_of_blocks"])
    assert early["macs"] < 0.6 * never["macs"]  # counted at what ran
    assert pd.isna(early["predicted_ms"])

    decided = pd.read_csv(making.out / "confidence.csv")
    assert decided.groupby("arm").size().to_dict() == dict.fromkeys([arm.name for arm in arms], 3)
    assert Thresholds.load(making.out / "thresholds-e0.json").target == 0
