"""Second-order terms: exact where only neighbours interact, nothing where shifts add up, and cheap to search with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_searched import COST, NUM_BLOCKS, best_by_enumeration, full_plan, random_table
from torch import Tensor, nn

from dyndit.analysis.extractors import Extractor
from dyndit.analysis.fidelity import Moments, frechet_distance, moments
from dyndit.calibration import CalibrationSettings, measure_table
from dyndit.plan import DepthPlan
from dyndit.routers.interactions import Interactions
from dyndit.routers.learned import LearnedSettings, train_router
from dyndit.routers.searched import Pair, Predictor, ShiftTable, search

NUM_PICTURES = 64
PAIRS = ((1, 1), (2, 2))


class Pixels(nn.Module):
    """The three values of a picture of one pixel."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return pictures.flatten(1).float(), pictures.flatten(1).float()


EXTRACTOR = Extractor("pixels", Pixels(), "pixels")


@dataclass
class QuadraticDrawing:
    """Picture i sees the steps i mod K and the next alone, and is a quadratic function of whether they are replaced:

        base + strength(p) left [step at p] + strength(q) right [next at q] + strength(p) both [step and next at p]

    so that moments of whole sets have interactions of neighbours, and no others. Pixels are whole numbers, as real ones
    are. `coupled` False leaves the first two terms of the sum: then shifts add up.
    """

    seed: int = 0
    num_steps: int = 4
    coupled: bool = True
    depths: tuple[int, ...] = (1, 2, 3, 4)
    trunk: str = "quadratic"
    exits: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.base = torch.randint(90, 160, (NUM_PICTURES, 3), generator=g)
        self.left, self.right, self.both = torch.randint(-9, 10, (3, NUM_PICTURES, 3), generator=g)
        timesteps = tuple(range(100 * self.num_steps, 0, -100))
        self.full = DepthPlan.full(timesteps, NUM_BLOCKS, "ddim", 1.5)
        self.setting = [self.seed, self.coupled]

    def pictures(self, plan: DepthPlan, indices: Sequence[int]) -> Tensor:
        rows = []
        for i in indices:
            step = i % self.num_steps
            mine = self.strength(plan, step)
            row = self.base[i] + mine * self.left[i]
            if self.coupled and step + 1 < self.num_steps:
                theirs = self.strength(plan, step + 1)
                row = row + theirs * self.right[i] + (mine if mine == theirs else 0) * self.both[i]
            rows.append(row)
        return torch.stack(rows).to(torch.uint8)[:, :, None, None]

    def strength(self, plan: DepthPlan, step: int) -> int:
        return (plan.num_blocks - plan.pairs[step][0] + 1) // 2

    def replaced(
        self, indices: Sequence[int], bands: Sequence[Sequence[int]], pairs: Sequence[Pair], ages: Sequence[int] = ()
    ) -> Iterator[Tensor]:
        yield self.pictures(self.full, indices)
        for band in bands:
            for pair in pairs:
                yield self.pictures(constant_at(self.full, band, pair), indices)

    def true_distance(self, plan: DepthPlan, reference: Moments) -> float:
        return frechet_distance(moments(EXTRACTOR.features(self.pictures(plan, range(NUM_PICTURES)))), reference)


def constant_at(full: DepthPlan, steps: Sequence[int], pair: Pair) -> DepthPlan:
    return full.with_pairs([pair if k in steps else p for k, p in enumerate(full.pairs)])


def reference_of(seed: int) -> Moments:
    g = torch.Generator().manual_seed(seed + 1_000)
    return moments(torch.randint(80, 170, (80, 3), generator=g).double())


def measured(drawing: QuadraticDrawing, *, second_order: bool = True, **options: object) -> ShiftTable:
    chosen = CalibrationSettings(NUM_PICTURES, drawing.num_steps, batch_size=16, pairs=PAIRS, second_order=second_order)
    return measure_table(drawing, EXTRACTOR, reference_of(drawing.seed), settings=chosen, cost=COST, **options)


def interacting(table: ShiftTable, seed: int, size: float = 0.3) -> ShiftTable:
    """The table with random terms of second order; those of the second moment symmetric, as all of them are."""
    g = torch.Generator().manual_seed(seed)
    mean = size * torch.randn(table.mean[1:].shape, generator=g, dtype=torch.float64)
    half = size / 2 * torch.randn(table.second[1:].shape, generator=g, dtype=torch.float64)
    return replace(table, interactions=Interactions(mean, half + half.mT))


def spaced(table: ShiftTable, num_steps: int) -> tuple[float, ...]:
    return tuple(table.edges[0] * (1 - k / num_steps) for k in range(num_steps))


@given(
    seed=st.integers(0, 10_000),
    pair=st.sampled_from(PAIRS),
    steps=st.sets(st.integers(0, 3), min_size=1),
)
def test_one_pair_at_any_steps_is_predicted_exactly(seed: int, pair: Pair, steps: set[int]) -> None:
    drawing = QuadraticDrawing(seed)
    table, plan = measured(drawing), constant_at(drawing.full, steps, pair)
    true = drawing.true_distance(plan, table.reference)
    assert Predictor(table, plan.timesteps).predict(plan) == pytest.approx(true, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("pair", PAIRS)
def test_without_the_terms_it_is_not(pair: Pair) -> None:
    """Guard of the test above."""
    drawing = QuadraticDrawing()
    table, plan = measured(drawing, second_order=False), constant_at(drawing.full, range(4), pair)
    assert table.interactions is None
    true = drawing.true_distance(plan, table.reference)
    assert abs(Predictor(table, plan.timesteps).predict(plan) - true) > 0.05 * true


@given(seed=st.integers(0, 10_000), choice=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_where_shifts_add_up_there_are_no_terms(seed: int, choice: list[int]) -> None:
    drawing = QuadraticDrawing(seed, coupled=False)
    table = measured(drawing)
    assert table.mean.abs().max() > 0.1
    for terms in (table.interactions.mean, table.interactions.second):
        assert terms.abs().max() < 1e-9
    choices = torch.tensor([choice])
    without = Predictor(replace(table, interactions=None), drawing.full.timesteps).distances(choices)
    torch.testing.assert_close(Predictor(table, drawing.full.timesteps).distances(choices), without)


@given(seed=st.integers(0, 10_000), num_steps=st.integers(1, 9))
def test_the_sum_over_entries_is_the_sum_over_pairs_of_pairs(seed: int, num_steps: int) -> None:
    """The definition, written out: at the table's own steps and at others, whose bands hold shares of several pairs."""
    table = interacting(random_table(4, 4, seed), seed)
    predictor, without = (Predictor(t, spaced(table, num_steps)) for t in (table, replace(table, interactions=None)))
    g = torch.Generator().manual_seed(seed)
    a = predictor.coverage(torch.randint(4, (2, num_steps), generator=g))
    expected = torch.zeros(2, 3, dtype=torch.float64)
    terms = table.interactions.mean
    for b in range(3):
        for p in range(3):  # without the full pair, which comes last
            for q in range(3):
                expected += (a[:, b, p] * a[:, b + 1, q])[:, None] * (terms[b, p] + terms[b, q]) / 2
    torch.testing.assert_close(predictor.moments_at(a)[0] - without.moments_at(a)[0], expected)


@given(seed=st.integers(0, 10_000), num_steps=st.integers(1, 9))
def test_slopes_are_the_derivative_of_the_distance(seed: int, num_steps: int) -> None:
    table = interacting(random_table(4, 4, seed), seed, size=0.05)
    predictor = Predictor(table, spaced(table, num_steps))
    choice = torch.randint(4, (num_steps,), generator=torch.Generator().manual_seed(seed))
    slopes, at, h = predictor.slopes(choice), predictor.coverage(choice[None]), 1e-5
    for step in range(num_steps):
        for pair in range(4):
            change = torch.zeros_like(at)
            change[0, :, pair] = h * predictor.weights[step]
            high, low = (predictor.frechet(*predictor.moments_at(at + sign * change)) for sign in (1, -1))
            assert ((high - low) / (2 * h)).item() == pytest.approx(slopes[step, pair].item(), rel=1e-4, abs=1e-5)


def test_slopes_feel_the_terms() -> None:
    """Guard of the test above; and full depth interacts with nothing."""
    table = random_table(4, 4, seed=2)
    more, choice = interacting(table, 2, size=0.05), torch.tensor([0, 1, 2, 3])
    slopes = [Predictor(t, full_plan(t).timesteps).slopes(choice) for t in (table, more)]
    assert (slopes[0] - slopes[1])[:, :3].abs().min() > 1e-4
    assert slopes[1][:, 3].abs().max() == 0
    alone = torch.tensor([[3, 0, 3, 1]])
    predictors = [Predictor(t, full_plan(t).timesteps) for t in (table, more)]
    assert predictors[0].distances(alone) == predictors[1].distances(alone)


@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 10_000), budget=st.sampled_from([0.45, 0.6, 0.8, 1.0]))
def test_search_finds_the_best_plan_of_a_small_table(seed: int, budget: float) -> None:
    table = interacting(random_table(num_steps=4, num_depths=4, seed=seed), seed, size=0.1)
    plan = search(table, full_plan(table), budget)
    value, _ = best_by_enumeration(table, budget)
    assert plan.figures["predicted_fd"] == pytest.approx(value, abs=1e-9)
    assert table.cost.share_of_time(plan) <= budget * (1 + 1e-6)


def test_the_terms_change_what_is_best() -> None:
    """Guard of the test above."""
    tables = [random_table(4, 4, seed) for seed in range(6)]
    changed = [
        best_by_enumeration(table, 0.6)[1] != best_by_enumeration(interacting(table, seed, size=0.1), 0.6)[1]
        for seed, table in enumerate(tables)
    ]
    assert any(changed)


@pytest.mark.parametrize("num_steps", [2, 4, 7])
def test_plans_of_other_step_counts_are_searched_and_learned(num_steps: int) -> None:
    table = interacting(random_table(4, 4, seed=1), 1)
    full = DepthPlan.full(spaced(table, num_steps), NUM_BLOCKS, "ddim", table.cfg_scale)
    plan = search(table, full, 0.6)
    assert Predictor(table, full.timesteps).predict(plan) == pytest.approx(plan.figures["predicted_fd"])
    assert table.cost.share_of_time(plan) <= 0.6 * (1 + 1e-6)
    learned = train_router(table, LearnedSettings(iterations=2)).plan(full, 0.6)
    assert table.cost.share_of_time(learned) <= 0.6 * (1 + 1e-6)


def test_the_base_through_a_plan_predicts_what_was_measured() -> None:
    table = interacting(random_table(4, 4, seed=1), 1)
    plan = full_plan(table).with_pairs([(1, 1), (1, 1), (2, 2), (4, 4)])
    predictor = Predictor(table, plan.timesteps)
    features = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    found = Moments(features.mean(0), features.T @ features / 64, 64)
    moved = Predictor(table, plan.timesteps, predictor.base_through(plan, found))
    assert moved.predict(plan) == pytest.approx(frechet_distance(found, table.reference))
    without = Predictor(replace(table, interactions=None), plan.timesteps, moved.base)
    assert without.predict(plan) != pytest.approx(moved.predict(plan))


def test_first_order_is_measured_as_without_them() -> None:
    drawing = QuadraticDrawing()
    with_terms, without = measured(drawing), measured(drawing, second_order=False)
    for name in ("mean", "second"):
        assert torch.equal(getattr(with_terms, name), getattr(without, name))
        assert torch.equal(getattr(with_terms.base, name), getattr(without.base, name))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_table_keeps_its_terms(tmp_path: Path, num_steps: int) -> None:
    """One band has no neighbour, and no terms."""
    table = measured(QuadraticDrawing(num_steps=num_steps))
    assert table.interactions.mean.shape == (num_steps - 1, 2, 3)
    table.save(tmp_path / "table.safetensors")
    again = ShiftTable.load(tmp_path / "table.safetensors")
    for name in ("mean", "second"):
        torch.testing.assert_close(
            getattr(again.interactions, name), getattr(table.interactions, name), rtol=1e-6, atol=0
        )
    choices = torch.zeros(1, num_steps, dtype=torch.long)
    first, second = (Predictor(t, spaced(table, num_steps)).distances(choices) for t in (table, again))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_a_table_without_terms_is_written_as_it_always_was(tmp_path: Path) -> None:
    table = measured(QuadraticDrawing())
    names = []
    for number, held in enumerate((table, replace(table, interactions=None))):
        held.save(tmp_path / f"{number}.safetensors")
        with safe_open(tmp_path / f"{number}.safetensors", "pt") as file:
            names.append(({*file.keys()}, file.metadata()))
    (more, metadata), (less, plain) = names
    moments_of = {f"{which}.{name}" for which in ("base", "reference") for name in ("mean", "second")}
    assert less == {"mean", "second", *moments_of}
    assert more - less == {"interactions.mean", "interactions.second"}
    assert metadata == plain
    assert ShiftTable.load(tmp_path / "1.safetensors").interactions is None


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    drawing, partial, seen = QuadraticDrawing(), tmp_path / "table.partial", []

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        measured(drawing, partial=partial, on_progress=stop)
    again = measured(drawing, partial=partial, on_progress=lambda d, t: seen.append((d, t)))
    entries = (4 + 3) * len(PAIRS)
    assert seen[0] == (2 * entries + 1, 4 * entries)
    assert seen[-1] == (4 * entries, 4 * entries)
    whole = measured(drawing)
    assert torch.equal(again.interactions.mean, whole.interactions.mean)
    assert torch.equal(again.interactions.second, whole.interactions.second)
    # Sums without the terms are of another measurement: they are not gone on from.
    without = measured(drawing, second_order=False, partial=partial, on_progress=lambda d, t: seen.append((d, t)))
    assert (without.interactions, seen[2 * entries]) == (None, (1, 4 * 4 * len(PAIRS)))
