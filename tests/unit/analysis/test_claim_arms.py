"""The arms of the claim: students, constant exits, own guides, cached parts, shuffles, locked guidance."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.analysis.compare.peers import PeerContext
from dyndit.analysis.compare.peers.constant_exit import ConstantExit
from dyndit.analysis.compare.peers.ecad import Ecad, PartShares, part_shares, periodic, run_of
from dyndit.analysis.compare.peers.internal_guidance import InternalGuidance
from dyndit.analysis.compare.peers.random_plan import shuffled
from dyndit.analysis.compare.peers.skips import Skips
from dyndit.analysis.compare.peers.student import AtDepth, Student, cut
from dyndit.errors import InputError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import OwnExit, Unconditional, locked, steps
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits

LABELS, STEPS, BLOCKS = [3, 1, 4, 1, 5], 6, 6
FIT = FitConfig(steps=3, batch_size=8, learning_rate=1e-3, ema_decay=0.5)
COST = CostModel(5, BLOCKS, PartTimes(1.0, 10.0, 2.0, 3.0), PartTimes(1.5, 18.0, 3.5, 5.0), 0.5)


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    return make_model(head="wide")


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> PeerContext:
    return PeerContext(tmp_path_factory.mktemp("peers"), load_digits(), FIT)


def draw(runs: DynamicDepth, plan: DepthPlan, batch_size: int = 5) -> torch.Tensor:
    options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
    return sample(runs, LABELS, plan=plan, batch_size=batch_size, **options).pictures


def planned(peer, model: DynamicDepth, cfg_scale: float = 1.5, solver: str = "unipc") -> DepthPlan:
    return peer.plan(full_plan(model, solver, STEPS, cfg_scale), model.depths)


genomes = st.tuples(
    *[st.builds(lambda g, p: g + p, st.sampled_from("phn"), st.text("01", min_size=12, max_size=12))] * 6
)


def test_a_genome_that_caches_nothing_is_the_model_bit_for_bit(model) -> None:
    peer = Ecad(genome=("p" + "1" * 12,) * STEPS)
    plan = planned(peer, model)
    assert plan.steps == full_plan(model, "unipc", STEPS, 1.5).steps
    assert torch.equal(draw(peer.model(model), plan), draw(model, full_plan(model, "unipc", STEPS, 1.5)))
    unguided = full_plan(model, "unipc", STEPS, 1.0)
    assert torch.equal(draw(peer.model(model), planned(peer, model, 1.0)), draw(model, unguided))


@settings(max_examples=12)
@given(genome=genomes)
def test_a_genomes_share_and_time_count_what_really_runs(model, genome) -> None:
    """Counted by hooks on attention and MLP: rows over pictures. A genome caches what it says, and nothing else."""
    peer = Ecad(genome=genome)
    runs, plan = peer.model(model), planned(peer, model)
    ran, handles = {"attn": 0, "mlp": 0}, []
    for block in model.backbone.blocks:
        for name in ran:

            def count(_module, args, _out, name=name) -> None:
                ran[name] += len(args[0])

            handles.append(getattr(block, name).register_forward_hook(count))
    draw(runs, plan)
    for handle in handles:
        handle.remove()
    total = sum(ran.values()) / len(LABELS)
    assert total == pytest.approx(peer.share_of_blocks(plan) * 2 * 2 * BLOCKS * STEPS)
    # Seconds: with branches that cost the same, parts that run are all that differs between genomes of equal branches.
    alike, shares = replace(COST, two=replace(COST.one)), PartShares(0.5, 0.5)
    fixed = STEPS * (alike.solver + alike.one.embed + alike.one.head)
    parts = sum(parts.count("1") for _, parts in run_of(genome, plan))
    assert shares.seconds(alike, genome, plan) == pytest.approx(fixed + parts * alike.one.block / 2)
    everything = Ecad(every=1)
    whole = shares.seconds(COST, everything.schedule(STEPS, BLOCKS), planned(everything, model))
    assert whole == pytest.approx(COST.plan_seconds(full_plan(model, "unipc", STEPS, 1.5)))
    assert shares.seconds(COST, genome, plan) <= whole + 1e-9


@settings(max_examples=8)
@given(genome=genomes)
def test_pictures_of_a_genome_do_not_depend_on_batch_mates(model, genome) -> None:
    runs, plan = Ecad(genome=genome).model(model), planned(Ecad(genome=genome), model)
    first = draw(runs, plan)
    assert (draw(runs, plan, batch_size=2).int() - first.int()).abs().max() <= 1
    assert torch.equal(draw(runs, plan), first)


def test_a_cached_part_is_the_output_of_the_step_before(model) -> None:
    """Cached attention of one block: the MLPs, the gates and the other blocks still see the step's own input."""
    everything, without = "p" + "1" * 12, "p" + "110111111111"
    peer = Ecad(genome=(everything, without, everything, everything, everything, everything))
    assert not torch.equal(draw(peer.model(model), planned(peer, model)), draw(model, planned(Ecad(1), model)))
    seen, block = [], model.backbone.blocks[1]
    handle = block.attn.register_forward_hook(lambda _module, _args, out: seen.append(out))
    draw(peer.model(model), planned(peer, model))
    handle.remove()
    assert len(seen) == STEPS - 1


def test_periodic_schedules_and_labels() -> None:
    found = periodic(4, 2, (1, 2))
    assert found == [("p1111",) * 4, ("p1111", "p0000") * 2, ("p1111", "h0000") * 2]
    assert Ecad(3, True).label == "every3-hold"
    assert Ecad(genome=found[1]).label != Ecad(genome=found[2]).label
    assert not any(c in Ecad(genome=found[1]).label for c in " /,")


def test_shares_of_a_blocks_time_are_shares(model) -> None:
    found = part_shares(model, batch_size=4, rounds=3)
    assert found.attention > 0
    assert found.mlp > 0
    assert found.attention + found.mlp <= 1 + 1e-9


def test_a_constant_exit_is_its_depth_at_every_step(model) -> None:
    plan = planned(ConstantExit(4, 2), model)
    assert set(map(str, plan.steps)) == {"4|e2"}
    assert ConstantExit(4, 2).model(model) is model
    assert set(map(str, planned(ConstantExit(4), model).steps)) == {"4|4"}
    assert set(map(str, planned(ConstantExit(4, 2), model, 1.0).steps)) == {"4"}


def test_skips_are_full_steps_and_forecasts_that_hold_their_guidance(model) -> None:
    peer = Skips(3, 2)
    assert list(map(str, planned(peer, model).steps)) == ["6|6", "6|6", "2+|held", "2+|held", "6|6", "6|6"]
    assert list(map(str, planned(peer, model, 1.0).steps)) == ["6", "6", "2+", "2+", "6", "6"]
    assert peer.model(model) is model


def test_an_own_guide_costs_no_pass_and_stands_beside_one(model) -> None:
    alone, beside = InternalGuidance(4, high=50.0), InternalGuidance(4, 1.5, high=50.0)
    assert alone.model(model) is model
    plan, other = planned(alone, model), planned(beside, model)
    assert set(map(str, plan.steps)) == {"6|e4", "6"}
    assert [str(step) == "6|6" for step in other.steps] == [str(step) == "6|e4" for step in plan.steps]
    pictures = {
        name: draw(one.model(model), planned(one, model)) for name, one in (("alone", alone), ("beside", beside))
    }
    assert not torch.equal(pictures["alone"], pictures["beside"])
    assert not torch.equal(pictures["beside"], draw(model, other))


def test_the_own_guide_beside_a_pass_is_the_papers_sum(model, make_inputs) -> None:
    """Each branch: exit + own * (full - exit) on the noise channels; the variance is full depth's."""
    from dyndit.models.dynamic import StepInputs, Work

    x, t, y = make_inputs(model.backbone)
    null = torch.full_like(y, model.backbone.condition.null_label)
    step = StepInputs(0, (Inputs(x, t, y), Inputs(x, t, null)), Work((6, 6)), (500,))
    peer = InternalGuidance(3, 2.0).model(model)
    with torch.no_grad():
        found, _ = peer.predict(step, None)
        for label, prediction in zip((y, null), found, strict=True):
            full, weak = model(x, t, label), model(x, t, label, depth=3)
            torch.testing.assert_close(prediction[:, :1], weak[:, :1] + 2 * (full - weak)[:, :1])
            torch.testing.assert_close(prediction[:, 1:], full[:, 1:])


def test_a_student_starts_as_the_exit_and_trains_only_what_runs(model, context, make_inputs) -> None:
    student = cut(model, 4)
    inputs = make_inputs(model.backbone)
    with torch.no_grad():
        assert torch.equal(AtDepth(student, 4)(*inputs), model(*inputs, depth=4))
    trained = Student(4).model(model, context)
    assert trained.depths == (4, 6)
    before, after = (dict(m.named_parameters()) for m in (cut(model, 4), trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("backbone.blocks.3.") for name in changed)
    assert any(name.startswith("exits.heads.4.") for name in changed)
    assert not any(
        name.startswith(("backbone.blocks.4.", "backbone.blocks.5.", "backbone.final_layer")) for name in changed
    )
    assert all(p.requires_grad or not name.startswith("backbone.blocks.0") for name, p in model.named_parameters())
    plan = planned(Student(4), trained)
    assert set(map(str, plan.steps)) == {"4|4"}
    assert set(map(str, planned(Student(4, False), trained).steps)) == {"4"}
    assert draw(trained, plan).shape == (5, 1, 8, 8)


def test_a_student_is_trained_once_for_its_model_and_budget(model, context, monkeypatch) -> None:
    first = Student(2).model(model, context)
    monkeypatch.setattr("dyndit.training.match.fit", None)
    assert Student(2, False).model(model, context).identity == first.identity
    with pytest.raises(TypeError):
        Student(2).model(model, replace(context, fit=replace(FIT, steps=4)))


def test_a_student_may_be_cut_where_the_model_has_no_exit(model, context, make_inputs) -> None:
    """Its head is a new one, and all that runs trains."""
    fewer = DynamicDepth(model.backbone, Exits(model.backbone, ExitConfig((2, 4), "wide")), pixel_space=True)
    trained = Student(3).model(fewer, context)
    assert set(map(str, planned(Student(3), trained).steps)) == {"3|3"}
    inputs = make_inputs(model.backbone)
    with torch.no_grad():
        started, found = (AtDepth(one, 3)(*inputs) for one in (cut(fewer, 3), trained))
    assert torch.isfinite(found).all()
    assert not torch.equal(started, found)


def test_a_student_that_trains_comes_nearer_to_full_depth(model, tmp_path: Path, make_inputs) -> None:
    longer = PeerContext(tmp_path, load_digits(), replace(FIT, steps=30, batch_size=32))
    x, t, y = make_inputs(model.backbone, batch=32)
    trained = Student(4).model(model, longer)
    with torch.no_grad():
        full = model(x, t, y)
        error = [(m(x, t, y, depth=4) - full).square().mean() for m in (model, trained)]
    assert error[1] < error[0]


@given(seed=st.integers(0, 500))
def test_shuffles_are_plans_whatever_forecasts_they_hold(seed: int) -> None:
    full = DepthPlan.full(tuple(range(900, 0, -100)), 6, "ddim", 1.5)
    plan = full.with_steps(steps("6|6", "2+", "2+|held", "4|e2", "6", "4+", "2", "2+", "6|6"))
    control = shuffled(plan, seed)
    assert sorted(map(str, control.steps)) == sorted(map(str, plan.steps))
    assert control == shuffled(plan, seed)


def test_locked_choices_have_one_guide() -> None:
    choices = ("12|6", "12", "12|e6", "8|8", "8", "4|e2", "2", "2+", "8+|held")
    assert locked(choices, OwnExit(4)) == steps("12|e4", "8|e4", "8+|e4")
    assert locked(choices, Unconditional(12)) == steps("8|12", "4|12", "2|12")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Ecad(0), "peer ecad: every 0"),
        (lambda m: planned(Ecad(genome=("p1111",)), m), "genome of 1 steps"),
        (lambda m: planned(Ecad(genome=("p111111111112",) * 6), m), "genome with 'p111111111112'"),
        (lambda m: planned(Ecad(genome=("q" + "1" * 12,) * 6), m), "genome with 'q1"),
        (lambda m: ConstantExit(4, 4), "guide 4"),
        (lambda m: ConstantExit(7).model(m), "depth 7"),
        (lambda m: Skips(1, 2), "peer skips: every 1"),
        (lambda m: Skips(2, 6).model(m), "depth 6"),
        (lambda m: InternalGuidance(6).model(m), "exit 6"),
        (lambda m: Student(6).model(m), "depth 6"),
        (lambda m: Student(4).model(m), "context"),
    ],
)
def test_bad_settings_are_one_line(model, make, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make(model)
    assert "\n" not in str(error.value)
