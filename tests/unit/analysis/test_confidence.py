"""The confidence router: who leaves is the picture's own affair, and thresholds keep what they promise."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndit.analysis.compare.peers.confidence import (
    ConfidenceSettings,
    ConfidentDepth,
    Signals,
    Thresholds,
    default_depths,
    measure_decisions,
    record_signals,
    threshold,
)
from dyndit.errors import CheckpointError, InputError
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs, Work
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import constant, ramp
from dyndit.plans.step import Step
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start
from dyndit.sampling.sample import sample

DEPTHS, LABELS, STEPS = (1, 2, 4), [3, 1, 4, 1, 5, 9, 2], 4
SETTINGS = ConfidenceSettings(depths=DEPTHS, num_pictures=60, batch_size=30)


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    return make_model()


@pytest.fixture(scope="module")
def signals(model) -> Signals:
    return record_signals(model, num_steps=STEPS, settings=SETTINGS)


def everywhere(value: float, cfg_scale: float = 1.5) -> Thresholds:
    return Thresholds(DEPTHS, (999.0, 0.0), ((value, value),), cfg_scale)


@pytest.fixture(scope="module")
def mixed(model, signals) -> ConfidentDepth:
    """A router under which pictures leave at every depth: thresholds at the medians of a band."""
    medians = tuple(tuple(band.flatten(1).median(1).values.tolist()) for band in signals.signal.transpose(0, 1)[None])
    return ConfidentDepth(model, Thresholds(DEPTHS, (999.0, 0.0), medians, 1.5))


def draw(runs: DynamicDepth, plan: DepthPlan, **changes) -> torch.Tensor:
    options = {"solver": plan.solver, "num_steps": STEPS, "cfg_scale": plan.cfg_scale} | changes
    return sample(runs, LABELS, plan=plan, **options).pictures


def decided(runs: ConfidentDepth, indices: list[int]) -> torch.Tensor:
    """(K, B): where the pictures of these indices left, drawn together."""
    batch = Batch(torch.tensor([LABELS[i] for i in indices]), tuple(indices))
    plan = full_plan(runs, "ddim", STEPS, 1.5)
    return torch.stack(advance(runs, batch, start(runs, batch, "ddim", STEPS), plan, Guidance(1.5)).memory)


@pytest.mark.parametrize("solver", ["ddim", "unipc", "ddpm"])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_threshold_zero_is_full_depth_and_infinity_the_first_exit(model, solver: str, cfg_scale: float) -> None:
    full = full_plan(model, solver, STEPS, cfg_scale)
    first = constant(full, model.depths, DEPTHS[1])
    never, at_once = (ConfidentDepth(model, everywhere(value, cfg_scale)) for value in (0.0, torch.inf))
    assert torch.equal(draw(never, full), draw(model, full))
    assert torch.equal(draw(at_once, full), draw(model, first))
    assert not torch.equal(draw(model, full), draw(model, first))


def test_a_picture_decides_alone_as_in_a_batch(mixed) -> None:
    together = decided(mixed, list(range(len(LABELS))))
    assert len(set(together[1].tolist())) > 1  # they part within a step, or the rest proves nothing
    assert set(together.flatten().tolist()) == {2, 4, 6}
    for i in range(len(LABELS)):
        assert decided(mixed, [i])[:, 0].tolist() == together[:, i].tolist()
    assert torch.equal(decided(mixed, [5, 0, 2]), together[:, [5, 0, 2]])
    plan = full_plan(mixed, "ddim", STEPS, 1.5)
    whole = draw(mixed, plan)
    assert whole.unique().numel() > 10
    for size in (1, 3):
        assert (draw(mixed, plan, batch_size=size).int() - whole.int()).abs().max() <= 1


def test_a_block_runs_the_rows_that_remain(mixed) -> None:
    ran, handles = [0] * mixed.num_blocks, []
    for index, block in enumerate(mixed.backbone.block_modules()):

        def count(_module, args, _out, index=index) -> None:
            ran[index] += len(args[0])

        handles.append(block.register_forward_hook(count))
    depths = decided(mixed, list(range(len(LABELS))))
    for handle in handles:
        handle.remove()
    assert ran == [2 * int((depths > index).sum()) for index in range(mixed.num_blocks)]
    assert ran[0] > ran[2] > ran[4] > 0


def test_rows_keep_their_place_and_their_prediction(mixed, model) -> None:
    """Every row's prediction is that of the exit it left at, under its own label."""
    x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    times, labels = torch.full((7,), 500), torch.tensor(LABELS)
    null = torch.full_like(labels, model.backbone.condition.null_label)
    with torch.no_grad():
        branches = (Inputs(x, times, labels), Inputs(x, times, null))
        step = StepInputs(0, branches, Work((6, 6)), (500,))
        (cond, uncond), (depths,) = mixed.predict(step, None)
        assert len(set(depths.tolist())) > 1
        for row, depth in enumerate(depths.tolist()):
            one = slice(row, row + 1)
            for found, y in ((cond, labels), (uncond, null)):
                torch.testing.assert_close(found[one], model(x[one], times[one], y[one], depth=depth))


def test_planned_steps_run_as_planned(model) -> None:
    plan = ramp(full_plan(model, "ddim", STEPS, 1.5), model.depths, 1, 5)
    unguided = plan.with_steps([Step(6)] * STEPS)
    runs = ConfidentDepth(model, everywhere(torch.inf))
    for wanted in (plan, unguided):
        assert torch.equal(draw(runs, wanted), draw(model, wanted))


def test_the_record_is_of_full_depth(model, signals) -> None:
    """Signals and errors of the first step, by hand from the batch's noise."""
    batch = Batch(torch.arange(30) % 10, tuple(range(30)), SETTINGS.seed)
    x = start(model, batch, "ddim", STEPS).x
    times, null = torch.full((30,), 999), torch.full((30,), model.backbone.condition.null_label)
    with torch.no_grad():
        exits = {}
        for depth in (*DEPTHS, 6):
            cond, uncond = model.branches(x, times, [batch.condition, null], [depth] * 2)
            exits[depth] = (uncond + 1.5 * (cond - uncond))[:, :1]
    assert signals.signal.shape == signals.error.shape == (STEPS, 2, 60)
    for i, (before, depth) in enumerate(((1, 2), (2, 4))):
        change = (exits[depth] - exits[before]).square().mean((1, 2, 3))
        error = (exits[depth] - exits[6]).square().mean((1, 2, 3))
        torch.testing.assert_close(signals.signal[0, i, :30], change)
        torch.testing.assert_close(signals.error[0, i, :30], error)


@pytest.mark.parametrize("share", [0.7, 0.9, 1.1])
def test_the_target_holds_on_pictures_that_were_not_calibrated_on(model, signals, share: float) -> None:
    target = share * signals.error[:, 0].mean().item()
    thresholds = signals.thresholds(target, num_bands=2)
    fresh = record_signals(model, num_steps=STEPS, settings=replace(SETTINGS, seed=77, num_pictures=120))
    errors = []
    for k, timestep in enumerate(fresh.timesteps):
        there = torch.ones(120, dtype=torch.bool)
        for i, limit in enumerate(thresholds.at(timestep)):
            leaves = there & (fresh.signal[k, i] < limit)
            errors.append(fresh.error[k, i][leaves])
            there &= ~leaves
    errors = torch.cat(errors)
    assert len(errors) > 50
    assert errors.mean() <= target


@given(seed=st.integers(0, 10_000), num=st.integers(20, 300), target=st.floats(0.01, 2))
def test_a_threshold_keeps_the_target_on_its_own_rows(seed: int, num: int, target: float) -> None:
    drawn = torch.Generator().manual_seed(seed)
    signal = torch.rand(num, generator=drawn)
    error = signal + 0.3 * torch.rand(num, generator=drawn)
    found = threshold(signal, error, target)
    leaving = error[signal < found]
    assert found == 0 or (len(leaving) >= 20 and leaving.mean() <= target)
    assert found <= threshold(signal, error, 2 * target)
    assert threshold(signal, error, 0.0) == 0
    assert (signal < threshold(signal, error, 1e9)).all()


def test_a_higher_target_leaves_earlier(model, signals) -> None:
    plan, means = full_plan(model, "ddim", STEPS, 1.5), []
    middle = signals.error.mean().item()
    for target in (0.0, 0.8 * middle, 1.2 * middle, 100 * middle):
        runs = ConfidentDepth(model, signals.thresholds(target, 2))
        means.append(measure_decisions(runs, plan, num_pictures=30, batch_size=30).mean_depth.mean().item())
    assert means == sorted(means, reverse=True)
    assert means[0] == 6
    assert means[-1] < 2.5  # a fresh picture may lie beyond all that were calibrated on
    assert len(set(means)) > 2


def test_flips_are_counted_against_a_disturbed_input(mixed) -> None:
    plan = full_plan(mixed, "ddim", STEPS, 1.5)
    still, shaken = (
        measure_decisions(mixed, plan, num_pictures=40, batch_size=20, noise=noise) for noise in (0.0, 0.3)
    )
    assert torch.equal(still.depths, shaken.depths)  # the disturbance does not touch the sampling
    assert (still.flip_rates == 0).all()
    assert 0 < shaken.flip_rates.mean() < 1
    frame = shaken.frame()
    assert list(frame.columns) == ["step", "timestep", "mean_depth", "flip_rate"]
    assert frame["timestep"].tolist() == list(plan.timesteps)
    assert frame["mean_depth"].tolist() == pytest.approx(shaken.depths.double().mean(1).tolist())


def test_bands_are_those_of_the_timesteps() -> None:
    found = Thresholds((1, 2), (900.0, 400.0, 100.0, 0.0), ((1.0,), (2.0,), (3.0,)))
    assert [found.at(t)[0] for t in (999, 900, 401, 400, 101, 100, 1, 0)] == [1, 1, 1, 2, 2, 3, 3, 3]


def test_thresholds_round_trip(tmp_path, signals) -> None:
    found = signals.thresholds(signals.error.mean().item(), 2)
    found.save(tmp_path / "thresholds.json")
    assert Thresholds.load(tmp_path / "thresholds.json") == found


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "dyndit-thresholds", "version": 1, "depths": 3}'])
def test_damaged_thresholds_are_refused(tmp_path, content: str) -> None:
    (tmp_path / "thresholds.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"thresholds\.json"):
        Thresholds.load(tmp_path / "thresholds.json")


def test_default_depths() -> None:
    assert default_depths(tuple(range(1, 13))) == (1, 2, 4, 6, 8)
    assert default_depths((4, 8, 12, 16, 20, 24, 28)) == (4, 8, 12, 20)
    assert default_depths((3, 6)) == (3,)
    assert default_depths((6,)) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, s: ConfidentDepth(m, Thresholds((2, 6), (9.0, 0.0), ((1.0,),))), r"confidence depths \[2, 6\]"),
        (lambda m, s: ConfidentDepth(m, Thresholds((2,), (9.0, 0.0), ((),))), r"confidence depths \[2\]"),
        (lambda m, s: ConfidentDepth(m, replace(everywhere(1.0), backbone="other")), "for backbone other"),
        (lambda m, s: ConfidentDepth(DynamicDepth(m.backbone), everywhere(1.0)), "confidence depths"),
        (lambda m, s: record_signals(m, settings=replace(SETTINGS, depths=(4, 2))), r"\[4, 2\]: expected two or more"),
        (lambda m, s: s.thresholds(-1.0, 2), "confidence target -1"),
        (lambda m, s: s.thresholds(0.1, 0), "in 0 bands"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, signals, make, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make(model, signals)
    assert "\n" not in str(error.value)
