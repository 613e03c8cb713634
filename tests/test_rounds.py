"""Rounds of a variant: distilled where exits matter, calibrated and searched again, until plans stand still."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dyndit import checkpoints
from dyndit.analysis.extractors import load_extractor
from dyndit.analysis.features import Measured
from dyndit.analysis.sets import PictureSet
from dyndit.arms import Arm, Preparation
from dyndit.backbones import DiTConfig
from dyndit.calibration import CalibrationSettings
from dyndit.data import load_digits
from dyndit.dynamic import DynamicDepth
from dyndit.emphasis import Emphasis
from dyndit.errors import InputError
from dyndit.exits import ExitConfig
from dyndit.experiment import Experiment, Inputs, Variant, settings_of
from dyndit.plan import DepthPlan
from dyndit.routers.searched import FILE, ShiftTable
from dyndit.tasks import Distill, Train, exit_error_table
from dyndit.training import FitConfig

DIGITS = load_digits()
FIT = FitConfig(steps=2, batch_size=8, learning_rate=1e-3, ema_decay=0.5, seed=3)
SHALLOW, DEEP = (2, 2), (4, 0)


@pytest.fixture
def making(make_model, tmp_path: Path) -> Preparation:
    """A model that came with exits other than the experiment's recipe has."""
    experiment = Experiment(
        model="", data="digits", extractor="digits", distill=Distill(fit=FIT), solvers=("ddim",), dynamic_steps=(3,),
        calibration=CalibrationSettings(70, 1, 70, pairs=(SHALLOW, DEEP)), calibration_steps=3, budgets=(0.6, 0.9),
        batch_size=35,
    )  # fmt: skip
    judges = (Measured(PictureSet("digits", DIGITS.uint8()[:300]), load_extractor("digits")),)
    return Preparation(experiment, make_model((2, 4)), judges, tmp_path, Console(quiet=True))


def with_variant(making: Preparation, variant: Variant, **distill: object) -> Preparation:
    experiment = replace(making.experiment, distill=replace(making.experiment.distill, **distill), variants=(variant,))
    return replace(making, experiment=experiment)


def scripted(monkeypatch: pytest.MonkeyPatch, *rounds: tuple[int, int]) -> list[tuple[Distill, str]]:
    """Plans that run one pair at every step, another pair each round; -> each distillation's recipe, and its start."""
    tables, seen, run = [], [], Distill.run

    def search(table, full: DepthPlan, budget: float, **_) -> DepthPlan:
        if table.exits not in tables:
            tables.append(table.exits)
        pair = rounds[tables.index(table.exits)]
        return replace(
            full.with_pairs([pair] * full.num_steps, budget=budget, trunk=table.trunk, exits=table.exits),
            figures={"predicted_fd": 1.0},
        )

    def watched(recipe: Distill, *arguments, start=None, **options):
        seen.append((recipe, start and start.exits_hash()))
        return run(recipe, *arguments, start=start, **options)

    monkeypatch.setattr("dyndit.arms.search", search)
    monkeypatch.setattr(Distill, "run", watched)
    return seen


def facts(arms: list[Arm]) -> list[tuple]:
    return [(arm.name, arm.plan, arm.predicted_ms, arm.model.exits_hash()) for arm in arms]


def test_rounds_end_when_the_plans_stand_still(making: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    making = with_variant(making, Variant("used", rounds=5))
    seen = scripted(monkeypatch, SHALLOW, DEEP, DEEP)
    arms, folder = making.variants(DIGITS), making.out / "variants" / "used"
    assert sorted(path.name for path in folder.glob("round-*")) == ["round-1", "round-2"]
    assert [arm.name for arm in arms] == ["searched-used-ddim-3-b0.6", "searched-used-ddim-3-b0.9"]
    assert {arm.plan.pairs for arm in arms} == {(DEEP,) * 3}

    # Each round's exits start from the round before's, and learn where its plans use them.
    plans = [[DepthPlan.load(path) for path in at.glob("plan-*.json")] for at in (folder, folder / "round-1")]
    assert [recipe.emphasis for recipe, _ in seen] == [Emphasis.of_plans(each) for each in plans]
    assert [recipe.emphasis.depths for recipe, _ in seen] == [(2,), (4,)]
    assert [start for _, start in seen] == [making.model.exits_hash(), plans[1][0].exits]
    assert {recipe.exits for recipe, _ in seen} == {ExitConfig((2, 4))}  # the model's own
    assert [recipe.fit.seed for recipe, _ in seen] == [4, 5]
    assert {arm.model.exits_hash() for arm in arms} == {arms[0].plan.exits}
    assert len({making.model.exits_hash(), plans[1][0].exits, arms[0].plan.exits}) == 3

    # A run that goes on makes nothing again.
    for name in ("search", "measure_shifts"):
        monkeypatch.setattr(f"dyndit.arms.{name}", None)
    monkeypatch.setattr(Distill, "run", None)
    assert facts(making.variants(DIGITS)) == facts(arms)


def test_rounds_may_go_by_measured_shifts(making: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = CalibrationSettings(70, 2, 70, pairs=(SHALLOW, (4, 4), DEEP))
    making = with_variant(making, Variant("shifts", rounds=2, emphasis="shifts", calibration=calibration))
    seen = scripted(monkeypatch, SHALLOW, DEEP, SHALLOW)
    making.variants(DIGITS)
    given = making.out / "variants" / "shifts" / "model"
    first = making.out / "variants" / "shifts" / "round-1" / "model"
    tables = [ShiftTable.load(given / FILE), ShiftTable.load(first / FILE)]  # as a run that goes on would find them
    models = [making.model, checkpoints.load(first)]
    wanted = [
        Emphasis.of_shifts(*each) for each in zip(tables, (exit_error_table(m, DIGITS) for m in models), strict=True)
    ]
    assert [recipe.emphasis for recipe, _ in seen] == wanted
    assert all(emphasis.weights((2, 4)).std(dim=1).min() > 0.01 for emphasis in wanted)


def test_rounds_keep_the_first_tables_times(making: Preparation) -> None:
    """Else the clock's noise would move plans."""
    first, trunk = making.table(), DynamicDepth(making.model.backbone)
    settled, table = making.settled(first, trunk, DIGITS, Variant("used", rounds=1))
    assert table.cost == first.cost
    assert ShiftTable.load(settled.out / "model" / "shift-table.safetensors").cost != first.cost  # measured anew
    assert table.exits == settled.model.exits_hash() != first.exits


def test_exits_that_do_not_move_end_the_rounds(making: Preparation) -> None:
    """With the true search."""
    making = with_variant(making, Variant("used", rounds=3), fit=replace(FIT, learning_rate=0.0))
    arms, folder = making.variants(DIGITS), making.out / "variants" / "used"
    assert [path.name for path in folder.glob("round-*")] == ["round-1"]
    assert len({arm.plan.pairs for arm in arms}) == 2
    assert all(arm.model.exits_hash() == making.model.exits_hash() for arm in arms)


@pytest.mark.parametrize("rounds", [0, 1])
def test_there_are_no_more_rounds_than_asked_for(
    rounds: int, making: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = with_variant(making, Variant("used", rounds=rounds))
    scripted(monkeypatch, SHALLOW, DEEP, SHALLOW)
    arms = making.variants(DIGITS)
    assert len(list((making.out / "variants" / "used").glob("round-*"))) == rounds
    assert {arm.plan.pairs for arm in arms} == {((SHALLOW, DEEP)[rounds],) * 3}


def test_a_trunk_that_trains_goes_on_from_the_round_before(
    making: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = Distill(ExitConfig((2, 4)), FIT, trunk="whole", trunk_rate=1.0)
    making = with_variant(making, Variant("whole", distill=distill, rounds=2))
    seen = scripted(monkeypatch, SHALLOW, DEEP, SHALLOW)
    arms = making.variants(DIGITS)
    assert [start is None for _, start in seen] == [True, False, False]
    hashes = {making.model.trunk_hash(), *(DepthPlan.load(p).trunk for p in making.out.rglob("plan-*.json"))}
    assert len(hashes) == 4
    assert [arm.name for arm in arms if arm.family == "full-whole"] == ["full-whole-ddim-3"]


def test_no_plan_within_the_budgets_leaves_nothing_to_do(making: Preparation) -> None:
    making = with_variant(making, Variant("used", rounds=2))
    making = replace(making, experiment=replace(making.experiment, budgets=(0.01,)))
    assert making.variants(DIGITS) == []
    assert not list((making.out / "variants" / "used").glob("round-*"))


def test_a_comparison_without_rounds_or_usage_is_the_run_it_was(making: Preparation) -> None:
    def settings(variant: Variant, **distill: object) -> dict:
        return settings_of(with_variant(making, variant, **distill).experiment, Inputs(), DIGITS)["experiment"]

    plain = settings(Variant("a", distill=Distill()))
    assert plain["variants"][0].keys() == {
        "name", "distill", "calibration", "calibration_solver", "calibration_steps", "calibration_cfg_scale",
        "refinements",
    }  # fmt: skip
    assert "emphasis" not in plain["distill"]
    assert "emphasis" not in plain["variants"][0]["distill"]
    used = Emphasis(((2, 0, 9, 1.0),))
    changed = settings(Variant("a", distill=Distill(emphasis=used), rounds=2), emphasis=used)
    assert changed["variants"][0]["rounds"] == 2
    for recipe in (changed["distill"], changed["variants"][0]["distill"]):
        assert recipe["emphasis"] == {"stretches": ((2, 0, 9, 1.0),), "num_timesteps": 1000, "rest": 0.1}


def test_a_variant_refuses_fewer_rounds_than_none() -> None:
    with pytest.raises(InputError, match="variant a: rounds -1, expected at least 0"):
        Variant("a", rounds=-1)
    with pytest.raises(InputError, match="variant a: emphasis 'pictures', expected plans or shifts"):
        Variant("a", emphasis="pictures")


def test_variants_distil_from_the_trunk_as_it_was_given(making: Preparation, make_model) -> None:
    """Not from what the comparison's own recipe made of it."""
    given = make_model(seed=5)
    variant = Variant("frozen", distill=Distill(fit=FIT, exits=ExitConfig((2, 4))))
    arms = replace(with_variant(making, variant), trunk=given).variants(DIGITS)
    assert {arm.model.trunk_hash() for arm in arms} == {given.trunk_hash()} != {making.model.trunk_hash()}


@pytest.mark.parametrize("exits", [ExitConfig((2, 4)), None], ids=["from the first step", "distilled after"])
def test_a_variant_trains_a_trunk_of_its_own(making: Preparation, exits: ExitConfig | None) -> None:
    train = Train(DiTConfig(**making.model.backbone.config()), FIT, "digits", exits=exits)
    making = with_variant(making, Variant("anew", train=train), exits=ExitConfig((2, 4)))
    arms, folder = making.variants(DIGITS), making.out / "variants" / "anew"
    assert {arm.family for arm in arms} == {"full-anew", "searched-anew"}
    (trunk,) = {arm.model.trunk_hash() for arm in arms}
    assert trunk == checkpoints.load(folder / "model").trunk_hash() != making.model.trunk_hash()
    assert (folder / "distillation").exists() == (exits is None)


WIDER = CalibrationSettings(70, 1, 70, pairs=(SHALLOW, (2, 0)))


@pytest.mark.parametrize(
    ("choice", "own"),
    [
        ({"refinements": 1}, False),
        ({"rounds": 0}, False),
        ({"calibration": CalibrationSettings(70, 1, 70, pairs=(DEEP,))}, False),
        ({"calibration": WIDER}, True),
        ({"calibration": CalibrationSettings(80, 1, 70, pairs=(DEEP,))}, True),
        ({"calibration_steps": 2}, True),
    ],
)
def test_a_variant_measures_a_table_only_where_the_first_does_not_hold_it(
    making: Preparation, choice: dict, own: bool
) -> None:
    arms = with_variant(making, Variant("other", **choice)).variants(DIGITS)
    assert arms
    assert (making.out / "variants" / "other" / "model" / "shift-table.safetensors").exists() == own
    if choice.get("calibration", WIDER) is not WIDER and not own:
        assert {pair for arm in arms for pair in arm.plan.pairs} <= {DEEP, (6, 6)}


def test_a_table_that_came_with_the_model_is_taken_for_its_own_judge_alone(making: Preparation) -> None:
    path, table = making.out / "model" / FILE, making.table()
    theirs = replace(
        table, reference=replace(table.reference, mean=table.reference.mean + 1)
    )  # to be told from one measured again
    theirs.save(path)
    assert torch.equal(making.table().reference.mean, theirs.reference.mean)
    for other in ({"extractor": "inception", "extractor_fingerprint": "theirs"}, {"exits": "theirs"}):
        replace(theirs, **other).save(path)
        again = making.table()
        assert (again.extractor, again.exits) == (table.extractor, table.exits)
        assert torch.equal(again.reference.mean, table.reference.mean)
