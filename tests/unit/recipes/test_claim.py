"""A rehearsal of the claim: both parts of a calibration, on a tiny model, from the backbone to the report."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dyndit.analysis.compare import run as comparison
from dyndit.analysis.compare import tuned
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.evolution import Evolution
from dyndit.analysis.compare.experiment import Inputs
from dyndit.analysis.compare.tuning import Tuning
from dyndit.analysis.report.runs import append_run, read_runs, runs_below
from dyndit.analysis.report.verify import verify
from dyndit.analysis.report.write import write_report
from dyndit.calibration.measure import CalibrationSettings
from dyndit.recipes.studies import claim
from dyndit.rounds import Repeats
from dyndit.sealed_csv import rows_of
from dyndit.training.match import Match

pytestmark = pytest.mark.usefixtures("quick_search")

NUM_IMAGES = 66


def thinned(tuning: Tuning) -> Tuning:
    """First and last setting and scale of every grid."""
    ends = lambda values: values[:1] + values[1:][-1:]  # noqa: E731
    return replace(tuning, peers=ends(tuning.peers), scales=ends(tuning.scales))


@pytest.fixture(scope="module")
def rehearsal() -> claim.Protocol:
    """The protocol with its depths, choices and arms, of few steps, pictures, updates and settings."""
    whole = claim.calibration
    distill = replace(whole.distill, num_steps=4, num_trajectories=8)
    short = {"steps": 2, "batch_size": 8, "checkpoint_every": 1, "precision": "fp32"}
    fits = {name: replace(getattr(distill, name), **short) for name in ("fit", "recall_fit")}
    distill = replace(distill, **fits)
    table = CalibrationSettings(num_pictures=66, num_bands=3, batch_size=66, choices=claim.CHOICES, forecast_ages=1)
    few = {"num_images": NUM_IMAGES, "batch_size": 33, "more_extractors": ("vgg-cifar10",), "calibration_steps": 3}
    few |= {"precision": "fp32"}  # a CPU without bf16 products would take 400 times as long
    chosen = replace(whole, distill=distill, calibration=table, **few)
    effort = Evolution(generations=1, population=2)
    small = {"steps": 4, "budget": 0.75, "counts": (2, 3, 4), "lock_steps": 3}
    return claim.Protocol(**small, calibration=chosen, evolution=effort, thinned=thinned)


@pytest.mark.parametrize("part", ["plans", "rivals"])
def test_a_whole_part(
    part: claim.Part,
    rehearsal: claim.Protocol,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Calibrate; compare, stopped while arms are scored; go on; report. Nothing that is stored is done again."""
    monkeypatch.setattr(tuned, "ROUNDS", Repeats(2))
    monkeypatch.setattr(comparison, "TIMING", Repeats(2))
    monkeypatch.setattr(claim, "TIMED", 2)
    out, written, updates_within = tmp_path / "1", [], claim.updates_within

    def few_updates(context: Context, minutes: float, out: Path) -> int:
        assert updates_within(context, minutes, out) > 2
        return 2

    monkeypatch.setattr(claim, "updates_within", few_updates)

    def stopped(path: Path, *rows: object) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        append_run(path, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "append_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            claim.carry_out(1, part, inputs, out, protocol=rehearsal)
    assert "calibration 1: scale " in (said := capsys.readouterr().out)
    assert f"{claim.minutes_of(out):.1f} minutes" in said
    assert (out / claim.EFFORT).exists() == (part == "rivals")
    folder, plan = out / f"{part}-1", out / "plan" / "plan-unipc-4-b0.75.json"
    tuning, rows = (folder / "tuning.csv").read_text(), read_runs(folder)
    assert rows["arm"].nunique() == 2
    with monkeypatch.context() as patch:
        for place in (Context, "distance"), (Context, "_measured_table"), (Match, "train"), (tuned, "_ratio"):
            patch.setattr(*place, lambda *_, **__: pytest.fail("done again"))
        page = claim.carry_out(1, part, inputs, out, protocol=rehearsal)
    assert page == folder / "report.html"
    assert (folder / "tuning.csv").read_text() == tuning
    once, then = ([row[:-1] for row in rows_of(at / "tuning.csv")] for at in (out / "plan", folder))  # without seals
    assert then[: len(once)] == once  # A and C are chosen once
    assert (folder / plan.name).read_bytes() == plan.read_bytes()
    _check_rows(part, read_runs(folder), rows)
    text = (folder / "report.md").read_text()
    assert "One calibration: nothing is shown." in text
    assert ("The searched plan saves" in text) == (part == "plans")
    assert verify(folder) == []
    assert page.is_file()
    write_report(runs_below(out), tmp_path / "report", margin=0.03)  # the folder of a calibration is one too
    assert (tmp_path / "report" / "report.md").read_text().count("### Rivals at equal time") == 2


ARMS = {
    "plans": {"A", "B", "C", "C-interval", "D", "searched", "shuffled"},
    "rivals": {"H", "K", "L", "J", "ecad", "searched"},
}
"""Families of a part, without the locked searches, of which a tiny model may reach one alone."""


def _check_rows(part: claim.Part, rows: pd.DataFrame, before: pd.DataFrame) -> None:
    """Every arm of the part by both extractors, scored on its seeds and timed alone."""
    scored, timed = (rows[rows["role"] == role] for role in ("score", "time"))
    assert scored["fd"].head(len(before)).tolist() == before["fd"].tolist()
    families, locks = set(scored["family"]), {"searched-E1", "searched-E2"}
    assert families - locks == ARMS[part]
    assert bool(families & locks) == (part == "plans")
    assert set(scored["seed"]) == {10_001}
    assert set(scored["calibration"]) == {"1"}
    assert set(timed["arm"]) == set(scored["arm"])
    assert set(timed["batch_size"]) == {"1"}
    assert scored.groupby("arm")["extractor"].nunique().eq(2).all()
    assert set(scored["variant"]) - {""} <= {"E1", "E2"}
