"""The peers that need no other library: each is the full model when switched off, and what it says when it is on."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndit.analysis.compare.arms import Arm
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.drawn import Drawn
from dyndit.analysis.compare.experiment import Experiment, settings_of
from dyndit.analysis.compare.experiment import Inputs as Given
from dyndit.analysis.compare.peers import Peer, PeerContext, PeerSettings, grid, peers
from dyndit.analysis.compare.peers.ase import FixedExits
from dyndit.analysis.compare.peers.ecad import Ecad
from dyndit.analysis.compare.peers.forecast import Forecast, extrapolate
from dyndit.analysis.compare.peers.internal_guidance import InternalGuidance
from dyndit.analysis.compare.peers.interval import GuidanceInterval
from dyndit.analysis.compare.peers.pruned import Pruned, effects, evenly_spread, most_effect, without_blocks
from dyndit.analysis.compare.peers.random_plan import RandomPlan, shuffled
from dyndit.analysis.compare.peers.stale import DeepReuse, Stale
from dyndit.analysis.compare.peers.switch import Switch, TwoModels
from dyndit.analysis.compare.peers.width import Width
from dyndit.analysis.compare.run import Comparison, in_turn
from dyndit.analysis.compare.sources import Peers
from dyndit.analysis.report.runs import read_runs
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dit import DiTConfig
from dyndit.models.dynamic import DynamicDepth, StepInputs, Work
from dyndit.models.exits import ExitConfig
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp
from dyndit.plans.step import Step
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start
from dyndit.sampling.sample import sample
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill
from dyndit.training.train import Train

pytestmark = pytest.mark.usefixtures("quick_search")

LABELS, STEPS = [3, 1, 4, 1, 5], 6
FIT = FitConfig(steps=3, batch_size=8, learning_rate=1e-3, ema_decay=0.5)
OURS = (Ecad, FixedExits, Forecast, GuidanceInterval, InternalGuidance, Pruned, RandomPlan, Stale, TwoModels, Width)
ON = (
    Ecad(2),
    Ecad(3, hold=True),
    FixedExits(4 / 7),
    Forecast(3, 2),
    Forecast(2, 2, "snr"),
    GuidanceInterval(0.5, 10.0),
    InternalGuidance(2),
    InternalGuidance(4, 1.5, high=20.0),
    Pruned(2),
    RandomPlan(0.6),
    Stale(2, 3),
    Stale(3, 1),
    TwoModels(0.5),
    Width(0.5),
)

TRAIN = Train(DiTConfig(8, 4, 1, width=16, num_blocks=6, num_heads=2, num_classes=10), FIT)


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    return make_model()


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> PeerContext:
    return PeerContext(tmp_path_factory.mktemp("peers"), load_digits(), FIT, TRAIN)


@pytest.fixture(scope="module")
def made(model, context):
    """What a peer runs, made once: settings -> model."""
    known: dict[PeerSettings, DynamicDepth] = {}

    def make(settings: PeerSettings) -> DynamicDepth:
        if settings not in known:
            known[settings] = settings.model(model, context)
        return known[settings]

    return make


def plan_of(settings: PeerSettings, runs: DynamicDepth, solver: str = "ddim", steps: int = STEPS) -> DepthPlan:
    return settings.plan(full_plan(runs, solver, steps, 1.5), runs.depths)


def draw(runs: DynamicDepth, plan: DepthPlan, batch_size: int = 5, seed: int = 0) -> torch.Tensor:
    return sample(
        runs, LABELS, plan=plan, solver=plan.solver, num_steps=plan.num_steps, batch_size=batch_size, seed=seed
    ).pictures


def test_every_peer_of_ours_is_found() -> None:
    found = peers()
    assert {settings.name: settings for settings in OURS}.items() <= found.items()


@pytest.mark.parametrize("settings", OURS, ids=lambda s: s.name)
def test_chosen_settings_have_labels_of_their_own(settings: type[PeerSettings]) -> None:
    labels = [one.label for one in settings.chosen()]
    assert len(set(labels)) == len(labels) >= 2
    assert not any(c in label for label in labels for c in " /,")


@pytest.mark.parametrize("solver", ["ddim", "unipc", "ddpm"])
@pytest.mark.parametrize("settings", OURS, ids=lambda s: s.name)
def test_switched_off_it_is_the_model_bit_for_bit(model, settings: type[PeerSettings], solver: str) -> None:
    off = settings.off()
    runs = off.model(model)
    plan = plan_of(off, runs, solver)
    assert torch.equal(draw(runs, plan), draw(model, full_plan(model, solver, STEPS, 1.5)))
    assert off.share_of_blocks(plan) == 1


@pytest.mark.parametrize("settings", ON, ids=lambda s: f"{s.name}-{s.label}")
def test_switched_on_it_differs_and_forgets(model, made, settings: PeerSettings) -> None:
    """Pictures depend neither on what was sampled before nor on the batch; on the peer they do."""
    runs = made(settings)
    plan = plan_of(settings, runs)
    first = draw(runs, plan)
    draw(runs, plan, seed=1)
    assert torch.equal(draw(runs, plan), first)
    assert (draw(runs, plan, batch_size=2).int() - first.int()).abs().max() <= 1
    assert first.unique().numel() > 10
    assert not torch.equal(first, draw(model, full_plan(model, "ddim", STEPS, 1.5)))
    share = settings.share_of_blocks(plan)
    assert share is None or 0 < share < 1


@pytest.mark.parametrize("settings", ON, ids=lambda s: f"{s.name}-{s.label}")
def test_a_fork_goes_its_own_way(made, settings: PeerSettings) -> None:
    runs = made(settings)
    plan = plan_of(settings, runs)
    batch, guidance = Batch(torch.tensor(LABELS), tuple(range(5))), Guidance(1.5)
    whole = advance(runs, batch, start(runs, batch, "ddim", STEPS), plan, guidance).x
    trajectory = advance(runs, batch, start(runs, batch, "ddim", STEPS), plan, guidance, stop=3)
    fork = trajectory.fork()
    without = plan.with_steps([Step(step.depth) for step in plan.steps])
    other = advance(runs, batch, fork, without, guidance, first=3).x
    assert torch.equal(advance(runs, batch, trajectory, plan, guidance, first=3).x, whole)
    if any(plan.uncond_depths[3:]):
        assert not torch.equal(other, whole)


def blocks_run(runs: DynamicDepth, plan: DepthPlan) -> int:
    """Rows through blocks, over the pictures: what a peer really ran, counted at the blocks."""
    ran, handles = [], []
    for block in runs.backbone.block_modules():
        handles.append(block.register_forward_hook(lambda _module, args, _out: ran.append(len(args[0]))))
    draw(runs, plan)
    for handle in handles:
        handle.remove()
    return sum(ran) // len(LABELS)


@pytest.mark.parametrize("interval", [(0.0, 1000.0), (0.5, 10.0)])
@pytest.mark.parametrize(
    "settings", [s for s in ON if not isinstance(s, TwoModels | Ecad | Width)], ids=lambda s: s.label
)
def test_the_share_of_blocks_is_what_runs(model, made, settings: PeerSettings, interval) -> None:
    """Also where guidance comes and goes: a branch that comes back has nothing fresh to reuse."""
    runs = made(settings)
    plan = GuidanceInterval(*interval).plan(plan_of(settings, runs), runs.depths)
    whole = 2 * STEPS * model.num_blocks
    assert blocks_run(runs, plan) == pytest.approx(settings.share_of_blocks(plan) * whole)


@given(
    every=st.integers(1, 7),
    depth=st.integers(1, 5),
    guided=st.lists(st.booleans(), min_size=1, max_size=12),
)
def test_share_of_stale_reuse(every: int, depth: int, guided: list[bool]) -> None:
    steps = len(guided)
    full = DepthPlan.full(tuple(range(steps, 0, -1)), 6, "ddim", 1.5)
    plan = full.with_steps([Step.equal(6, guide) for guide in guided])
    share = Stale(every, depth).share_of_blocks(plan)
    full_steps = len(range(0, steps, every))
    cond = 6 * full_steps + depth * (steps - full_steps)
    assert share <= plan.share_of_blocks
    assert share * 12 * steps >= cond + depth * sum(guided) - 1e-9
    if all(guided):
        assert share * 12 * steps == pytest.approx(2 * cond)


def test_a_step_between_adds_what_was_kept(model, make_inputs) -> None:
    """At the very inputs of the full step, the reused prediction is the full one's."""
    x, t, y = make_inputs(model.backbone)
    peer = DeepReuse(model, Stale(2, 3))
    null = torch.full_like(y, model.backbone.condition.null_label)
    with torch.no_grad():
        branches = (Inputs(x, t, y), Inputs(x, t, null))
        at = [StepInputs(k, branches, Work((6, 6)), (500, 400, 300)) for k in range(3)]
        elsewhere = tuple(replace(branch, x=x + 1) for branch in branches)
        full, memory = peer.predict(at[0], None)
        again, same = peer.predict(at[1], memory)
        moved, _ = peer.predict(replace(at[1], branches=elsewhere), memory)
        after, later = peer.predict(at[2], same)
    for one, other, far, third in zip(full, again, moved, after, strict=True):
        torch.testing.assert_close(one, other)
        assert (one - far).abs().max() > 1e-2  # the step's own input counts
        torch.testing.assert_close(one, third)
    assert [len(kept) for kept in later] == [2, 2]
    assert same == memory


@given(
    slope=st.floats(-3, 3),
    at=st.lists(st.floats(-20, 20), min_size=3, max_size=3, unique_by=lambda v: round(v, 1)),
)
def test_the_forecast_of_what_is_linear_is_exact(slope: float, at: list[float]) -> None:
    base = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 4)
    line = [base + slope * base.cos() * v for v in at]
    torch.testing.assert_close(extrapolate(*line[:2], *at), line[2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("along", ["step", "snr"])
def test_the_forecast_peer_extrapolates_in_its_variable(along: str) -> None:
    """Residuals linear in that variable are forecast exactly; held, or in the other variable, they are not."""
    from dyndit.analysis.compare.peers.stale import Kept
    from dyndit.process import DDPM

    times = (999, 700, 450, 200)
    where = {
        "step": [float(k) for k in range(4)],
        "snr": DDPM().log_snr(torch.tensor(times)).tolist(),
    }
    residuals = [torch.full((2, 3, 4), 1.0 + v) for v in where[along]]
    kept = [Kept(k, times[k], residuals[k]) for k in (0, 2)]
    inputs = Inputs(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2))
    step = StepInputs(3, (inputs,), Work((6,)), times)
    torch.testing.assert_close(Forecast(2, 2, along).residual(kept, step, DDPM()), residuals[3])
    other = Forecast(2, 2, "snr" if along == "step" else "step").residual(kept, step, DDPM())
    assert (other - residuals[3]).abs().max() > 0.1
    assert torch.equal(Forecast(2, 2, along).residual(kept[:1], step, DDPM()), residuals[0])


def test_the_schedule_of_ase_is_the_published_one() -> None:
    """28 blocks, an exit after each: 28, 28, 24, 24, 20, 20, 16, 16, 12, 12 from t = 0 up."""
    full = DepthPlan.full(tuple(range(950, 0, -100)), 28, "ddim", 1.5)
    plan = FixedExits().plan(full, tuple(range(1, 29)))
    assert plan.depths[::-1] == (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)
    assert plan.uncond_depths == plan.depths
    sparse = FixedExits().plan(full, (4, 16, 28))
    assert set(sparse.depths) == {16, 28}


@given(share=st.floats(0.2, 1), seed=st.integers(0, 9), layers=st.sets(st.integers(1, 11), min_size=1, max_size=11))
def test_a_random_plan_costs_what_it_should(share: float, seed: int, layers: set[int]) -> None:
    depths = (*sorted(layers), 12)
    full = DepthPlan.full(tuple(range(900, 0, -100)), 12, "ddim", 1.5)
    settings = RandomPlan(share, seed)
    if depths[0] > share * 12 * (1 + 1e-9):
        with pytest.raises(InputError, match="random share"):
            settings.plan(full, depths)
        return
    plan = settings.plan(full, depths)
    gap = max(b - a for a, b in itertools.pairwise(depths)) if len(depths) > 1 else 12
    assert share - gap / (2 * 9 * 12) < plan.share_of_blocks + 1e-9
    assert plan.share_of_blocks <= share * (1 + 1e-9)
    assert plan == settings.plan(full, depths)
    assert {depth for step in plan.steps for depth in step.exits} <= set(depths)


def test_random_plans_differ_by_seed() -> None:
    full = DepthPlan.full(tuple(range(900, 0, -100)), 12, "ddim", 1.5)
    plans = {RandomPlan(0.5, seed).plan(full, tuple(range(1, 13))).steps for seed in range(5)}
    assert len(plans) == 5


def test_a_shuffled_plan_has_the_same_steps_elsewhere(model) -> None:
    plan = ramp(full_plan(model, "ddim", 6, 1.5), model.depths, 1)
    control = shuffled(plan, 0)
    assert sorted(map(str, control.steps)) == sorted(map(str, plan.steps))
    assert control.steps != plan.steps
    assert control.share_of_blocks == plan.share_of_blocks
    assert shuffled(plan, 0) == control != shuffled(plan, 1)


def test_pruning_keeps_the_right_blocks(model) -> None:
    assert evenly_spread(12, 8) == (0, 2, 3, 5, 6, 8, 9, 11)
    assert evenly_spread(6, 1) == (0,)
    assert most_effect([5, 1, 4, 2, 3], 3) == (0, 2, 4)
    student = without_blocks(model, (0, 2, 5))
    for new, old in enumerate((0, 2, 5)):
        for mine, theirs in zip(student.blocks[new].parameters(), model.backbone.blocks[old].parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()
    assert torch.equal(student.final_layer.linear.weight, model.backbone.final_layer.linear.weight)


def test_a_block_that_does_nothing_has_no_effect(make_model) -> None:
    model = make_model()
    model.backbone.blocks[4].reset()
    found = effects(model, load_digits(), num_pictures=16)
    assert found[4] == 0
    assert min(e for i, e in enumerate(found) if i != 4) > 0


def test_pruned_weights_are_trained_once_and_bound_to_their_trunk(model, make_model, context, monkeypatch) -> None:
    settings = Pruned(3, "spread")
    first = settings.model(model, context)
    kept = without_blocks(model, evenly_spread(6, 3))
    assert any(
        not torch.equal(a, b) for a, b in zip(kept.parameters(), first.backbone.parameters(), strict=True)
    )  # fine-tuned, all through
    monkeypatch.setattr("dyndit.training.match.fit", None)
    again = settings.model(model, context)
    assert again.identity.backbone == first.identity.backbone
    with pytest.raises(TypeError):
        settings.model(make_model(seed=3), context)  # another backbone's are not taken for these


def test_matching_brings_a_student_nearer(model, tmp_path: Path) -> None:
    from dyndit.training.match import Match

    student = without_blocks(model, (0, 1, 3, 5))
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    _, result = Match(replace(FIT, steps=30, batch_size=32)).run(model, student, load_digits(), tmp_path)
    losses = result.losses["loss"]
    assert losses.tail(5).mean() < 0.9 * losses.head(5).mean()
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.named_parameters())


def test_the_switch_asks_the_small_model_first(model, make_model) -> None:
    small = make_model(seed=4, num_blocks=2, width=12)
    settings = TwoModels(0.5)
    calls = []
    peer = Switch(model, small, settings)
    handles = [
        backbone.blocks[0].register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, backbone in (("large", model.backbone), ("small", small.backbone))
    ]
    draw(peer, full_plan(peer, "ddim", 4, 1.5))
    for handle in handles:
        handle.remove()
    assert calls == ["small", "small", "large", "large"]
    with pytest.raises(InputError, match="num_classes=5"):
        Switch(model, make_model(num_classes=5), settings)


def test_the_switchs_small_model_is_trained_as_the_trunk_is_with_fewer_blocks(model, context, monkeypatch) -> None:
    """The comparison's own recipe but for the blocks, once for all shares: on digits, what `digits_small` trains."""
    from dyndit.recipes.digits import train
    from dyndit.recipes.studies.digits_small import train as small

    asked = []

    def run(recipe: Train, *_: object) -> None:
        asked.append(recipe)
        raise InterruptedError

    made_before = [TwoModels(share, 2).model(model, context).small for share in (0.3, 0.5)]
    assert [m.num_blocks for m in made_before] == [2, 2]
    assert len(list(context.out.glob("switch-depth2-*[0-9a-f]"))) == 1
    monkeypatch.setattr(Train, "run", run)
    with pytest.raises(InterruptedError):
        TwoModels(0.5).model(model, replace(context, train=replace(train, exits=ExitConfig((8,)))))
    assert asked == [small]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Stale(2, 6).model(m), "stale depth 6"),
        (lambda m: Stale(0, 2).model(m), "stale every 0"),
        (lambda m: FixedExits(1.0), "ase drop 1"),
        (lambda m: RandomPlan(0.0), "random share 0"),
        (lambda m: TwoModels(1.5), "switch share 1.5"),
        (lambda m: TwoModels(0.5, 0), "switch depth 0"),
        (lambda m: Pruned(-1), "pruned drop-1"),
        (lambda m: Pruned(2).model(m), "context"),
        (lambda m: TwoModels(0.5).model(m), "context"),
        (lambda m: TwoModels(0.5).model(m, PeerContext(Path(), load_digits(), FIT)), "no `train`"),
        (lambda m: Pruned(6).model(m, PeerContext(Path(), load_digits(), FIT)), "pruned drop 6"),
    ],
)
def test_bad_settings_are_one_line(model, make, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make(model)
    assert "\n" not in str(error.value)


def test_arms_take_turns_and_drift_cancels(model) -> None:
    arms = [Arm("full", full_plan(model, "ddim", 3, 1.5), settings=name) for name in "abcde"]
    orders = [[arm.settings for arm in in_turn(arms, block, batch)] for block in range(3) for batch in range(4)]
    assert all(sorted(order) == list("abcde") for order in orders)
    assert len({tuple(order) for order in orders}) > 8
    places = {name: sum(order.index(name) for order in orders) for name in "abcde"}
    assert len(set(places.values())) == 1  # a machine that slows down steadily slows all alike


class Recorder:
    """Stands in for `sample`: notes who draws what, when; optionally breaks off."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = [], stop_after

    def __call__(self, model: DynamicDepth, labels, **settings):
        if settings["stats"]:
            if self.stop_after is not None and len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            self.calls.append((settings["seed"], settings["first_index"], settings["plan"].router, id(model)))
        return sample(model, labels, **settings)


@pytest.fixture
def comparison(model, tmp_path):
    from rich.console import Console

    from dyndit.analysis.metrics.extractors import load_extractor
    from dyndit.analysis.metrics.features import Measured
    from dyndit.analysis.metrics.sets import PictureSet

    real = PictureSet("digits", load_digits().uint8()[:300])
    references = tuple(Measured(real, load_extractor(name)) for name in ("digits", "digits-lenet"))
    experiment = Experiment(
        model="", data="digits", extractor="digits", distill=Distill(fit=FIT), solvers=("ddim",), peer_steps=(3,),
        peers=(Stale(2, 2), FixedExits(), GuidanceInterval(0.5, 10.0), Pruned(1)), num_blocks=2, num_images=70,
        batch_size=30, metrics=("fd", "kid", "is", "prc"), more_extractors=("digits-lenet",),
    )  # fmt: skip
    return Comparison(experiment, model, references, tmp_path, Console(quiet=True))


def test_the_comparison_measures_peers_in_turn_and_goes_on(comparison, model, monkeypatch) -> None:
    context = Context(**vars(comparison), data=load_digits())
    arms = [Arm("full", full_plan(model, "ddim", 3, 1.5)), *Peers().arms(context)]
    assert [arm.family for arm in arms] == ["full", "stale", "ase", "interval", "pruned"]
    broken = Recorder(stop_after=15 + 7)  # within the second block
    monkeypatch.setattr("dyndit.analysis.compare.run.sample", broken)
    with pytest.raises(KeyboardInterrupt):
        comparison.measure(arms)
    path = comparison.out / "runs.csv"
    assert len(pd.read_csv(path)) == 2 * 5  # a row for each judge
    resumed = Recorder()
    monkeypatch.setattr("dyndit.analysis.compare.run.sample", resumed)
    comparison.measure(arms)
    assert {seed for seed, *_ in resumed.calls} == {1}
    firsts = [first for _, first, *_ in resumed.calls]
    assert firsts == [0] * 5 + [30] * 5 + [60] * 5  # batch by batch, all arms at each
    both = pd.read_csv(path).set_index(["arm", "block"])
    assert both.groupby("extractor").size().to_dict() == {"digits": 10, "digits-lenet": 10}
    assert both[["fd", "kid", "is", "precision", "recall"]].notna().all(axis=None)
    rows, witness = (both[both["extractor"] == judge.extractor.name] for judge in comparison.references)
    assert (rows["ms_per_picture"] == witness["ms_per_picture"]).all()  # the same pictures
    assert (rows["fd"] != witness["fd"]).all()
    stale = rows.loc[("stale-ddim-3-every2-depth2", 0)]
    assert stale["share_of_blocks"] == pytest.approx((6 + 2 + 6) / 18)
    assert pd.isna(stale["mean_depth_cond"])
    macs = rows["macs"].groupby("arm").first()
    assert macs["stale-ddim-3-every2-depth2"] / macs["full-ddim-3"] == pytest.approx(14 / 18, abs=0.1)
    assert (rows["macs"].groupby("arm").nunique() == 1).all()
    assert rows.loc[("pruned-ddim-3-drop1-byeffect", 0), "share_of_blocks"] == pytest.approx(5 / 6)
    # The pictures are those that one call over the whole block gives.
    whole = sample(model, [i % 10 for i in range(70)], plan=arms[0].plan, num_steps=3, seed=1, batch_size=30)
    for found, row in zip((rows, witness), comparison._rows(arms[0], 1, [Drawn.of(whole)], 0.0), strict=True):
        assert found.loc[("full-ddim-3", 1), "fd"] == pytest.approx(row["fd"], rel=1e-9)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_block_that_was_stopped_goes_on_within_it(comparison, model, monkeypatch, damaged: bool) -> None:
    """Kept batches are not drawn again, and the rows are those of an undisturbed run. A damaged file is drawn again."""
    monkeypatch.setattr("dyndit.analysis.compare.run.EVERY", 2)
    arms = [Arm("full", full_plan(model, "ddim", steps, 1.5)) for steps in (2, 3)]
    comparison = replace(comparison, experiment=replace(comparison.experiment, batch_size=14, num_blocks=1))
    undisturbed = replace(comparison, out=comparison.out / "whole")
    undisturbed.measure(arms)
    monkeypatch.setattr("dyndit.analysis.compare.run.sample", Recorder(stop_after=9))
    with pytest.raises(KeyboardInterrupt):
        comparison.measure(arms)
    kept = sorted((comparison.out / "drawn" / "0").iterdir())
    assert [path.name for path in kept] == ["000000.safetensors", "000001.safetensors"]
    if damaged:
        kept[1].write_bytes(kept[1].read_bytes()[:-1])
    monkeypatch.setattr("dyndit.analysis.compare.run.sample", resumed := Recorder())
    comparison.measure(arms)
    assert [first for _, first, *_ in resumed.calls] == ([28, 28, 42, 42] if damaged else []) + [56, 56]
    found, whole = (read_runs(one.out) for one in (comparison, undisturbed))
    figures = ["arm", "extractor", "fd", "kid", "precision", "recall"]
    pd.testing.assert_frame_equal(found[figures], whole[figures])
    assert not list((comparison.out / "drawn" / "0").iterdir())
    parts = comparison._parts(0, arms)
    parts.write(0, {arm.name: [Drawn(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 1.0, 0.5)] for arm in arms})
    assert [part[arms[0].name].seconds for part in parts.read()] == [1.0]
    others = replace(arms[0], plan=replace(arms[0].plan, cfg_scale=2.0)), arms[1]
    assert not list(comparison._parts(0, [*others]).read())  # the same names, other pictures


def test_an_experiments_peers_are_told_apart_in_its_manifest(comparison) -> None:
    ours = comparison.experiment
    settings = [
        settings_of(replace(ours, peers=(peer,)), Given(), load_digits())
        for peer in (*grid(Stale, every=(2,), depth=(2,)), Forecast(2, 2))
    ]
    assert settings[0]["experiment"]["peers"] != settings[1]["experiment"]["peers"]
    assert settings[0]["experiment"]["peers"][0]["peer"] == "stale"


def test_a_peer_shares_the_models_modules(model) -> None:
    peer = Stale(2, 2).model(model)
    assert isinstance(peer, Peer)
    assert peer.backbone is model.backbone
    assert peer.depths == (6,)
    assert copy.deepcopy(peer).settings == Stale(2, 2)


def test_the_recipe_takes_every_peer() -> None:
    from dyndit.recipes.digits_peers import experiment

    assert {type(settings) for settings in experiment.peers} == {peer for peer in peers().values() if peer.available()}
    assert set(OURS) <= {type(settings) for settings in experiment.peers}
    assert len(experiment.peers) == len({(s.name, s.label) for s in experiment.peers})


@pytest.mark.parametrize("settings", OURS, ids=lambda s: s.name)
def test_on_the_digits_model(settings: type[PeerSettings], context) -> None:
    """Every peer runs on the backbone that ships, with the settings it is compared at (shorter training)."""
    import dyndit
    from dyndit.models.exits import ExitConfig, Exits

    model = dyndit.load("digits")
    model = DynamicDepth(model.backbone, Exits(model.backbone, ExitConfig(head="adaln-linear"))).eval()
    chosen = settings.chosen()[0]
    runs = chosen.model(model, context)
    pictures = draw(runs, plan_of(chosen, runs, steps=3))
    assert pictures.shape == (5, 1, 8, 8)
    assert pictures.unique().numel() > 10


@pytest.mark.parametrize("recipe", ["digits_peers", "cifar10_peers"])
def test_the_packaged_comparisons_hold_every_peer_that_can_run_there(recipe: str) -> None:
    from dyndit.analysis.compare.experiment import Experiment
    from dyndit.cli.recipes import find

    held = {settings.name for settings in find(recipe, "experiment", Experiment).peers}
    everyone = {name for name, peer in peers().items() if peer.available()}
    assert everyone - held == (set() if recipe == "digits_peers" else {"switch"})
