"""Rivals tuned on the calibration seeds: least distance within the time, resumed from the file, never from scores."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from dyndit import files, sealed_csv
from dyndit.analysis.compare import tuned
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.evolution import Evolution
from dyndit.analysis.compare.evolved import Evolved
from dyndit.analysis.compare.experiment import Experiment, Inputs, Variant, settings_of
from dyndit.analysis.compare.peers.constant_exit import ConstantExit
from dyndit.analysis.compare.peers.ecad import Ecad
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.analysis.compare.run import Comparison
from dyndit.analysis.compare.sources import Searched, Variants
from dyndit.analysis.compare.tuned import TUNING, Candidate, Tuned, choose
from dyndit.analysis.compare.tuning import SLACK, Tuning
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.analysis.report.claims import EXPLAINING, RIVALS
from dyndit.analysis.report.runs import read_runs
from dyndit.calibration.measure import CalibrationSettings
from dyndit.errors import InputError
from dyndit.models.dit import CARDS
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import OwnExit, locked
from dyndit.recipes.studies import claim
from dyndit.rounds import Repeats
from dyndit.seals import SEAL
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill

CHOICES = ("6|3", "3|3", "3|e2", "3", "2", "2+")
DEPTHS = ConstantExit(3, 2), ConstantExit(2), GuidanceInterval(0.0, 1000.0)


@pytest.fixture(scope="module")
def context(make_model, tmp_path_factory) -> Context:
    """A comparison with a measured table on a tiny model; few pictures, so that it takes seconds."""
    calibration = CalibrationSettings(num_pictures=70, num_bands=4, batch_size=70, choices=CHOICES, forecast_ages=1)
    experiment = Experiment(
        *("", "digits", "digits", Distill(fit=FitConfig(steps=2, batch_size=8))),
        calibration=calibration,
        calibration_steps=4,
        points=(("ddim", 4),),
        budgets=(0.6,),
        full_points=(("ddim", 4),),
        num_blocks=1,
        num_images=70,
        batch_size=35,
        metrics=("fd",),
    )
    data = load_digits()
    references = (Measured(PictureSet("digits", data.uint8()), load_extractor("digits")),)
    out = tmp_path_factory.mktemp("run")
    found = Context(experiment, make_model(), references, data, out, Console(quiet=True))
    # Times of its own, the same at every run. A pass of both branches takes nearly twice as long as one.
    one = PartTimes(embed=0.01, block=0.1, exit=0.02, head=0.03)
    cost = CostModel(35, 6, one, replace(one, block=0.19), solver=0.01)
    object.__setattr__(found, "table", replace(found.table, cost=cost))
    return found


def with_tuning(context: Context, out: Path, **changes: object) -> Context:
    tuning = Tuning(**({"family": "rival", "peers": DEPTHS, "solver": "ddim", "reference": 4} | changes))
    own = replace(context, experiment=replace(context.experiment, tunings=(tuning,)), out=out)
    object.__setattr__(own, "table", context.table)
    return own


def test_the_best_setting_within_the_time_becomes_the_arm(context: Context, tmp_path: Path) -> None:
    own = with_tuning(context, tmp_path, scales=(1.0, 1.5), steps=(2, 3, 4, 5, 6), share=0.6, counts=2)
    (arm,) = Tuned().arms(own)
    rows = pd.read_csv(tmp_path / TUNING)
    drawn = rows[rows["fd"].notna()]
    best = drawn.loc[drawn["fd"].idxmin()]
    assert arm.settings == f"{best['peer']}-{best['settings']}"
    assert (arm.plan.num_steps, arm.plan.cfg_scale) == (best["steps"], best["cfg_scale"])
    assert (drawn["share"] <= 0.6 * SLACK).all()
    assert (rows[rows["fd"].isna()]["share"] > 0.6 * SLACK).all()
    for _, group in rows.groupby(["peer", "settings", "cfg_scale"]):
        fitting = group[group["fd"].notna()]["steps"]
        assert 1 <= len(fitting) <= 2
        assert sorted(group["steps"], reverse=True) == list(group["steps"])  # the largest counts first
    assert f"scale{arm.plan.cfg_scale:g}" in arm.name


def test_it_resumes_from_what_was_tried(context: Context, tmp_path: Path, monkeypatch) -> None:
    own = with_tuning(context, tmp_path, steps=(3, 4), counts=0)
    whole, text = Tuned().arms(own)[0], (tmp_path / TUNING).read_text()
    rows = pd.read_csv(tmp_path / TUNING)
    assert len(rows) == len(DEPTHS) * 2
    sealed_csv.write(tmp_path / TUNING, rows.head(2).drop(columns=SEAL))
    again, calls = Tuned().arms(own)[0], []
    assert (again.name, again.plan) == (whole.name, whole.plan)
    monkeypatch.setattr(Context, "distance", lambda *_: calls.append(1))
    assert Tuned().arms(own)[0].plan == whole.plan
    assert not calls
    kept = [line.rsplit(",", 2)[0] for line in text.splitlines()]  # but for seconds and checksum
    assert [line.rsplit(",", 2)[0] for line in (tmp_path / TUNING).read_text().splitlines()] == kept


def test_a_model_that_is_no_plan_is_timed(context: Context, tmp_path: Path, monkeypatch) -> None:
    """Once per setting and guidance, at the reference steps; its other step counts and scales cost in proportion."""
    asked, shares = [], {("every2", True): 0.5, ("every2", False): 0.25, ("every3", True): 0.8, ("every3", False): 0.4}

    def timed(own: Context, rival: Candidate, plan: DepthPlan, *_: object) -> float:
        assert (rival.plan.num_steps, plan) == (4, own.full("ddim", 4))
        assert rival.model is not own.model
        asked.append((rival.peer.label, rival.plan.cfg_scale > 1))
        return shares[asked[-1]]

    monkeypatch.setattr(tuned, "_times_as_long", timed)
    own = with_tuning(context, tmp_path, peers=(Ecad(2), Ecad(3)), scales=(1.0, 1.5, 2.0), steps=(3, 4, 5), share=0.6)
    (arm,) = Tuned().arms(own)
    assert sorted(asked) == sorted(shares)
    drawn = pd.read_csv(tmp_path / TUNING).dropna(subset="fd")
    found = {(row["settings"], row["cfg_scale"]): (row["steps"], row["share"]) for _, row in drawn.iterrows()}
    assert found == {
        ("every2", 1.0): (5, 0.3125),
        ("every2", 1.5): (4, 0.5),
        ("every2", 2.0): (4, 0.5),
        ("every3", 1.0): (5, 0.5),
        ("every3", 1.5): (3, pytest.approx(0.6)),
        ("every3", 2.0): (3, pytest.approx(0.6)),
    }
    assert arm.predicted_ms is None


def test_a_setting_is_really_timed(context: Context, tmp_path: Path) -> None:
    own = with_tuning(context, tmp_path, peers=(Ecad(2),), steps=(4,), share=10.0)
    choose(own, own.experiment.tunings[0])
    assert 0.05 < pd.read_csv(tmp_path / TUNING)["share"].item() < 10


def test_a_scale_can_be_chosen_before_there_is_a_table(context: Context, tmp_path: Path) -> None:
    """As the claim does: the table is measured at the scale that full depth does best with."""
    own = with_tuning(context, tmp_path, peers=DEPTHS[2:], scales=(1.0, 1.5, 3.0), steps=(4,))
    del vars(own)["table"]
    best = choose(own, own.experiment.tunings[0])
    rows = pd.read_csv(tmp_path / TUNING)
    assert best.plan.cfg_scale == rows.loc[rows["fd"].idxmin(), "cfg_scale"]
    assert (rows["share"] == 0).all()
    assert rows["fd"].min() == pytest.approx(own.distance(best.plan))
    assert "table" not in vars(own)
    assert not (tmp_path / "model").exists()


def test_minutes_end_a_tuning(context: Context, tmp_path: Path) -> None:
    own = with_tuning(context, tmp_path, steps=(4,), minutes=1e-9)
    (arm,) = Tuned().arms(own)
    assert len(pd.read_csv(tmp_path / TUNING)) == 1
    assert Tuned().arms(own)[0].plan == arm.plan  # what was tried before counts as it did then
    assert len(pd.read_csv(tmp_path / TUNING)) == 1


def test_tuned_arms_are_scored_on_seeds_of_their_own(context: Context, tmp_path: Path) -> None:
    own = with_tuning(context, tmp_path, peers=DEPTHS[:1], steps=(4,))
    own = replace(own, experiment=replace(own.experiment, first_seed=10_000))
    object.__setattr__(own, "table", context.table)
    arms = Tuned().arms(own)
    Comparison(own.experiment, own.model, own.references, tmp_path, own.console).measure(arms)
    assert set(pd.read_csv(tmp_path / "runs.csv")["seed"]) == {10_000}


def test_the_best_of_a_group_takes_its_name(context: Context, tmp_path: Path) -> None:
    """Chosen on the calibration seeds; the others of the group are no arms."""
    own = with_tuning(context, tmp_path, steps=(4,), group="J")
    first = own.experiment.tunings[0]
    tunings = tuple(replace(first, family=f"J-{k}", peers=(peer,)) for k, peer in enumerate(DEPTHS))
    own = replace(own, experiment=replace(own.experiment, tunings=tunings))
    object.__setattr__(own, "table", context.table)
    (arm,), rows = Tuned().arms(own), pd.read_csv(tmp_path / TUNING)
    best = next(tuning for tuning in tunings if tuning.family == rows.loc[rows["fd"].idxmin(), "family"])
    assert (arm.family, arm.peer) == ("J", best.peers[0])


@pytest.mark.parametrize(("ratio", "steps"), [(0.9, 5), (0.7, 6), (0.5, 6), (1.1, 4), (1.4, 3), (0.985, 4), (1.015, 4)])
def test_an_arm_takes_the_plans_time_or_the_next_slower_count(
    context: Context, tmp_path: Path, monkeypatch, ratio: float, steps: int
) -> None:
    """The largest count stays if none is slow enough. The ratio is kept, so that a resumed run has the same arms."""
    own = with_tuning(context, tmp_path, peers=DEPTHS[:1], steps=(4,), share=0.6, matched=True)
    best = choose(own, own.experiment.tunings[0])
    tuning = replace(own.experiment.tunings[0], steps=(2, 3, 4, 5, 6))
    monkeypatch.setattr(tuned, "_ratio", lambda *_: ratio)
    found = tuned.matched(own, tuning, best)
    assert (found.plan.num_steps, found.peer, found.model) == (steps, best.peer, best.model)
    assert (found is best) == (steps == 4)
    monkeypatch.setattr(tuned, "_ratio", lambda *_: pytest.fail("timed again"))
    assert tuned.matched(own, tuning, best).plan == found.plan
    assert tuned.matched(own, replace(tuning, steps=(4,)), best) is best  # no other step count


def test_times_are_matched_to_the_searched_plan(context: Context, tmp_path: Path) -> None:
    """Really timed, in turns with the plan that the comparison searches."""
    own = with_tuning(context, tmp_path, peers=DEPTHS[1:2], steps=(1, 8), share=0.6, matched=True, counts=0)
    (arm,) = Tuned().arms(own)
    assert (tmp_path / "plan-ddim-4-b0.6.json").is_file()
    rows = pd.read_csv(tmp_path / tuned.MATCHED)
    assert len(rows) == 1
    ratio, tried = rows["ratio"].iloc[0], rows["steps"].iloc[0]
    assert arm.plan.num_steps == (1 if ratio / tried >= 1 - tuned.MATCHING else 8)
    assert (arm.family, arm.variant) == ("rival", "")


def test_arms_are_timed_in_batches_of_another_size(context: Context, tmp_path: Path, monkeypatch) -> None:
    own = with_tuning(context, tmp_path, peers=DEPTHS[:2], steps=(4,))
    experiment = replace(own.experiment, time_batch=3)
    comparison = Comparison(experiment, own.model, own.references, tmp_path, own.console)
    object.__setattr__(own, "table", context.table)
    arms = [*Searched().arms(own), *Tuned().arms(own)]
    comparison.measure(arms)
    monkeypatch.setattr("dyndit.analysis.compare.run.TIMING", Repeats(3))
    comparison.time(arms)
    rows = read_runs(tmp_path)
    timed, scored = (rows[rows["role"] == role].set_index("arm") for role in ("time", "score"))
    assert list(timed.index) == list(scored.index) == [arm.name for arm in arms]
    assert (timed["fd"] == scored["fd"]).all()
    assert set(timed["batch_size"]) == {"3"}
    assert (timed["ms_per_picture"] != scored["ms_per_picture"]).all()
    assert timed["predicted_ms"].isna().all()
    before = (tmp_path / "runs.csv").read_bytes()
    monkeypatch.setattr("dyndit.analysis.compare.run.paired_rounds", lambda *_, **__: pytest.fail("timed again"))
    comparison.time(arms)
    comparison.measure(arms)
    assert (tmp_path / "runs.csv").read_bytes() == before


def test_shuffles_of_every_searched_plan(context: Context) -> None:
    experiment = replace(context.experiment, shuffle_seeds=(0, 1))
    own = replace(context, experiment=experiment)
    object.__setattr__(own, "table", context.table)
    searched, *others = Searched().arms(own)
    assert [arm.settings for arm in others] == ["seed0", "seed1"]
    for arm in others:
        assert sorted(map(str, arm.plan.steps)) == sorted(map(str, searched.plan.steps))
        assert (arm.family, arm.budget) == ("shuffled", 0.6)
    assert experiment.calibrated(3).shuffle_seeds == (3, 4)


def test_a_search_with_locked_guidance_uses_no_other(context: Context, tmp_path: Path, monkeypatch) -> None:
    """Without the original model's own step every step is guided by the exit, at another number of steps too."""
    monkeypatch.setattr("dyndit.calibration.samplers.measure_cost", lambda *_, **__: context.table.cost)
    choices = locked(("6|3", *CHOICES), OwnExit(2))
    assert not any(choice.forecast for choice in choices)  # the exit that guides is as deep as the forecasts
    calibration = replace(context.experiment.calibration, choices=choices, forecast_ages=0)
    lock = Variant("locked", calibration=calibration, whole=False, points=(("ddim", 5),), budgets=(0.5,))
    own = replace(context, experiment=replace(context.experiment, variants=(lock,)), out=tmp_path)
    object.__setattr__(own, "table", context.table)
    (arm,) = Variants().arms(own)
    assert arm.plan.num_steps == 5
    assert {step.guide for step in arm.plan.steps} == {OwnExit(2)}
    assert arm.plan.figures["predicted_share_of_time"] <= 0.5 * (1 + 1e-9)


def test_an_evolved_arm_keeps_its_time_and_what_it_measured(context: Context, tmp_path: Path, monkeypatch) -> None:
    effort = Evolution(generations=1, population=3)
    own = replace(context, experiment=replace(context.experiment, evolution=effort), out=tmp_path)
    object.__setattr__(own, "table", context.table)
    (arm,) = Evolved().arms(own)
    full = context.predicted_ms(context.full("ddim", 4))
    assert arm.predicted_ms <= 0.6 * full * (1 + 1e-9)
    assert (arm.family, arm.budget, arm.settings) == ("ecad", 0.6, "evolved")
    monkeypatch.setattr(Context, "distance", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("dyndit.analysis.compare.evolved.part_shares", lambda *_: pytest.fail("timed again"))
    assert Evolved().arms(own)[0].peer == arm.peer
    assert len(list((tmp_path / "ecad").iterdir())) == 2


def test_settings_of_tunings_name_their_peers() -> None:
    tuning = Tuning("rival", (ConstantExit(3, 2), GuidanceInterval(0.0, math.inf)))
    experiment = Experiment("", "digits", "digits", Distill(), tunings=(tuning,))
    found = settings_of(experiment, Inputs(), load_digits())["experiment"]["tunings"][0]
    whole = {"peer": "interval", "low": 0.0, "high": "inf"}  # JSON has no infinity
    assert found["peers"] == [{"peer": "constant-exit", "depth": 3, "guide": 2}, whole]


def test_a_calibration_has_seeds_of_its_own() -> None:
    experiment = Experiment("", "digits", "digits", Distill(), first_seed=10_000, evolution=Evolution(seed=2))
    third = experiment.calibrated(3)
    assert (third.number, third.first_seed, third.evolution.seed) == (3, 10_003, 5)
    assert third.calibration.seed - experiment.calibration.seed == third.distill.fit.seed == 3_000
    assert experiment.calibrated(0) == replace(experiment, controls=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peers": ()}, "no peers"),
        ({"share": 0.0}, "share 0"),
        ({"counts": -1}, "counts -1"),
        ({"minutes": float("nan")}, "minutes nan"),
    ],
)
def test_bad_tunings_are_one_line(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"tuning rival: {message}"):
        Tuning(**({"family": "rival", "peers": DEPTHS} | wrong))


def test_a_time_that_no_setting_meets_has_no_arm(context: Context, tmp_path: Path) -> None:
    """One line says so, and the other tunings of a long run are not lost."""
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    own = replace(with_tuning(context, tmp_path, share=0.01), console=console)
    never = own.experiment.tunings[0]
    possible = replace(never, family="other", share=None, peers=DEPTHS[:1], steps=(4,))
    own = replace(own, experiment=replace(own.experiment, tunings=(never, possible)))
    object.__setattr__(own, "table", context.table)
    assert [arm.family for arm in Tuned().arms(own)] == ["other"]
    assert "no arm: tuning rival: no setting within 0.01" in console.export_text()
    with pytest.raises(InputError, match="no setting within 0"):
        choose(own, never)


def test_the_claims_cost_is_estimated_from_full_depths_time() -> None:
    """Ten milliseconds a picture, an hour for each rival. By hand: B tries 5 scales at 15 counts of 80 pictures."""
    protocol = claim.Protocol()
    plans, rivals = protocol.plans(3, 1.5, 60.0, guide=4), protocol.rivals(3, 1.5, 60.0, updates=100)
    found = claim.expected(protocol, rivals, 10.0)
    assert found["trainings"] == 6 * 20  # three students, two pruned backbones, a width
    assert found["evolution"] == 60
    assert found["pictures to score"] == pytest.approx(6 * 4.5 * rivals.num_images / 60_000)  # G, H to L
    assert claim.expected(protocol, rivals, 20.0)["pictures to score"] == 2 * found["pictures to score"]
    found = claim.expected(protocol, plans, 10.0)
    assert (found["trainings"], found["evolution"]) == (0, 0)
    assert found["pictures to score"] == pytest.approx((8 * 4.5 + 10) * plans.num_images / 60_000)  # A, B to G, two E
    only = replace(protocol, without=tuple({t.family for t in protocol.tunings(1.5, 60.0)} - {"B"}))
    only = only.plans(3, 1.5, 60.0, guide=4)
    assert claim.expected(protocol, only, 10.0)["tuning"] == pytest.approx(5 * 15 * 80 * 4.5 / 60_000)
    assert claim.expected(protocol, only, 1e6)["tuning"] == 60  # its limit


def test_the_claims_recipe_has_every_arm_of_the_protocol() -> None:
    """Seeds as the page says, the rivals by letter, and settings that a manifest can hold."""
    plans, rivals = claim.Protocol().plans(3, 1.5, 60.0, 4), claim.Protocol().rivals(3, 1.5, 60.0, 100)
    tunings = (*plans.tunings, *rivals.tunings)
    plainest = {"D-constant": "D", "D-skips": "D"}
    families = {*"ABHKL", "C-own", "C-pass", "C-interval", *plainest, *claim.CACHES}
    assert sorted(tuning.family for tuning in tunings) == sorted(families)  # each in one part
    assert {tuning.family for tuning in rivals.tunings} == {*"HKL", *claim.CACHES}
    groups = {tuning.family: tuning.group for tuning in tunings if tuning.group}
    assert groups == {"C-own": "C", "C-pass": "C", **plainest, **dict.fromkeys(claim.CACHES, "J")}
    reported = {family for family, _ in (RIVALS | EXPLAINING).values()}
    reported -= {"shuffled", "ecad", "searched-E1", "searched-E2"}
    assert reported <= families - groups.keys() | set(groups.values())
    assert [tuning.family for tuning in tunings if not tuning.matched] == ["A"]
    assert [variant.name for variant in plans.variants] == ["E1", "E2"]
    assert (rivals.variants, rivals.shuffle_seeds, plans.evolution) == ((), (), None)
    assert (plans.shuffle_seeds, rivals.evolution.seed) == ((3,), 3)
    for found in (plans, rivals):
        assert (found.first_seed, found.search_seed, found.calibration.seed) == (10_003, 3, 1_003_003)
        assert found.distill.fit.seed == found.peer_budget.seed == 3_000
    assert {tuning.share for tuning in tunings} == {None, 0.45}
    assert [round(share * CARDS["cifar10"].num_blocks) for share in (1 / 6, 1 / 3, 1 / 2, 2 / 3)] == list(claim.EXITS)
    for tuning in tunings:
        assert len({(peer.name, peer.label) for peer in tuning.peers}) == len(tuning.peers)
    few = claim.PROTOCOLS["unipc-10"].plans(3, 1.5, 60.0, 4)
    assert {tuning.family for tuning in few.tunings} == {tuning.family for tuning in plans.tunings}
    assert few.variants == ()
    assert few.tunings[1].steps == tuple(range(3, 11))
    rest = claim.PROTOCOLS["unipc-10"].rivals(3, 1.5, 60.0, 100)
    assert {tuning.family for tuning in rest.tunings} == {"H", *claim.CACHES}
    flow = claim.PROTOCOLS["flow"].plans(3, 1.5, 60.0, 4)
    assert {flow.calibration_solver, flow.distill.solver, flow.points[0][0], flow.tunings[0].solver} == {"flow-euler"}
    settings = settings_of(rivals, Inputs(), load_digits())
    assert files.to_json(Path("manifest.json"), settings)
