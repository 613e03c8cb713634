"""The guidance sweep: its arms, its rows by scale, its figure in a report that verifies."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dyndit.analysis import read_runs
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.experiment import Experiment, GuidanceSweep
from dyndit.analysis.compare.guidance import Guided
from dyndit.analysis.compare.run import Comparison
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.macs import model_macs
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.analysis.report.guidance import guidance_figure, sweep_of
from dyndit.analysis.report.runs import scored_rows
from dyndit.analysis.report.verify import verify
from dyndit.analysis.report.write import write_report
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.step import NoGuide, OwnExit, Unconditional
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill

SWEEP = GuidanceSweep(scales=(1.0, 1.5, 3.0), steps=4, exits=(2, 4), intervals=((0.5, 10.0),))


@pytest.fixture
def comparison(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Context, Comparison]:
    experiment = Experiment(
        *("", "digits", "digits", Distill()),
        guidance=SWEEP,
        solvers=("ddim",),
        full_steps=(2, 4),
        num_blocks=2,
        num_images=20,
        batch_size=10,
        metrics=("fd", "prc"),
    )
    data, model = load_digits(), make_model()
    references = (Measured(PictureSet("digits", data.uint8()), load_extractor("digits")),)
    parts = PartTimes(embed=0.1, block=1.0, exit=0.2, head=0.3)
    cost = CostModel(10, 6, parts, parts, 0.0)
    monkeypatch.setattr(Context, "predicted_ms", lambda _, plan: cost.plan_seconds(plan))
    context = Context(experiment, model, references, data, tmp_path, Console(quiet=True))
    return context, Comparison(experiment, model, references, tmp_path, Console(quiet=True))


def test_each_scale_is_guided_in_each_way(comparison: tuple[Context, Comparison]) -> None:
    arms = Guided().arms(comparison[0])
    assert [arm.name for arm in arms] == [
        "full-ddim-4-scale1",
        *(f"own-exit-ddim-4-e{d}-scale1.5" for d in (2, 4)),  # full depth at 1.5 is the comparison's own
        "interval-ddim-4-0.5_10-scale1.5",
        "full-ddim-4-scale3",
        *(f"own-exit-ddim-4-e{d}-scale3" for d in (2, 4)),
        "interval-ddim-4-0.5_10-scale3",
    ]
    by_name = {arm.name: arm.plan for arm in arms}
    assert not by_name["full-ddim-4-scale1"].guided
    assert {step.guide for step in by_name["own-exit-ddim-4-e2-scale3"].steps} == {OwnExit(2)}
    kinds = {type(step.guide) for step in by_name["interval-ddim-4-0.5_10-scale3"].steps}
    assert kinds == {NoGuide, Unconditional}
    macs = model_macs(comparison[0].model)
    assert macs.plan(by_name["own-exit-ddim-4-e2-scale3"]) == 4 * (macs.full + macs.leave[2])
    context = replace(comparison[0], experiment=replace(comparison[0].experiment, guidance=None))
    assert Guided().arms(context) == []


def test_rows_carry_their_scale_and_the_report_draws_the_sweep(
    comparison: tuple[Context, Comparison], tmp_path: Path
) -> None:
    context, measuring = comparison
    from dyndit.analysis.compare.sources import FullDepth

    arms = [*FullDepth().arms(context), *Guided().arms(context)]
    assert len({arm.name for arm in arms}) == len(arms)
    measuring.measure(arms)
    measuring.measure(arms)  # nothing is done twice
    runs = read_runs(tmp_path)
    assert len(runs) == 2 * len(arms)
    assert set(runs["cfg_scale"]) == {1.0, 1.5, 3.0}
    sweep = sweep_of(scored_rows(runs))
    assert len(sweep) == 2 * (3 + 2 * 3)
    assert set(sweep["steps"]) == {4}
    out = tmp_path / "report"
    write_report(tmp_path, out)
    assert (out / "guidance.png").exists()
    assert "guidance.png" in (out / "report.md").read_text()
    assert verify(out) == []
    (out / "guidance.png").write_bytes(b"other")
    assert any("guidance.png" in line for line in verify(out))


def test_lines_begin_unguided(comparison: tuple[Context, Comparison], tmp_path: Path) -> None:
    context, measuring = comparison
    from dyndit.analysis.compare.sources import FullDepth

    measuring.measure([*FullDepth().arms(context), *Guided().arms(context)])
    figure = guidance_figure(sweep_of(scored_rows(read_runs(tmp_path))))
    assert sum(axis.get_visible() for axis in figure.axes) == 3  # FD, precision, recall
    axis = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("unconditional pass", "own exit e2", "own exit e4", "noise levels 0.5_10"),
    ]
    for container in axis.containers:
        assert list(container[0].get_xdata()) == [1.0, 1.5, 3.0]


def test_one_scale_is_no_sweep(comparison: tuple[Context, Comparison], tmp_path: Path) -> None:
    from dyndit.analysis.compare.sources import FullDepth

    comparison[1].measure(FullDepth().arms(comparison[0]))
    assert sweep_of(scored_rows(read_runs(tmp_path))).empty
