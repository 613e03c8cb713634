"""What a plan costs by measured parts: branches, blocks, and heads by depth."""

import json
import time
from dataclasses import replace

import pytest

from dyndit.models.exits import HEADS
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.step import Step
from dyndit.sampling.timing import measure_cost

ONE = PartTimes(embed=0.25, block=1.0, exit=0.5, head=0.125, exits={2: 4.0, 3: 2.0})
COST = CostModel(8, num_blocks=4, one=ONE, two=replace(ONE, block=2.0, exit=1.0, exits={2: 8.0}), solver=16.0)


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        ("1", 16.25 + 1 + 0.5),
        ("2|held", 16.25 + 2 + 4),
        ("3", 16.25 + 3 + 2),
        ("4", 16.25 + 4 + 0.125),
        ("1|1", 16.25 + 2 + 1),  # two branches as one batch of twice the rows
        ("2|2", 16.25 + 4 + 8),
        ("3|2", 16.25 + 4 + 4 + 1 + 2),  # one leaves at 2, then the other goes on alone
        ("2|4", 16.25 + 4 + 4 + 2 + 0.125),
        ("3|e2", 16.25 + 3 + 2 + 4),  # and the head of its own exit
        ("2+", 16.25 + 2 + 2 * 4),  # and that head at the step which it builds on
        ("3+|held", 16.25 + 3 + 2 * 2),
    ],
)
def test_a_step_costs_its_own_heads(step: str, seconds: float) -> None:
    assert COST.step_seconds(Step.parse(step)) == seconds


def test_description_keeps_the_depths_through_json() -> None:
    assert CostModel.from_description(json.loads(json.dumps(COST.describe()))) == COST


def test_one_time_may_serve_all_exits() -> None:
    parts = PartTimes(embed=0.25, block=1.0, exit=0.5, head=0.125)
    described = CostModel(8, 4, parts, parts, 16.0).describe()
    found = CostModel.from_description(json.loads(json.dumps(described)))
    assert found == CostModel(8, 4, parts, parts, 16.0)
    assert [found.step_seconds(Step(depth)) for depth in (1, 2, 3, 4)] == [17.75, 18.75, 19.75, 20.375]


def test_blocks_that_differ_cost_their_own_time() -> None:
    one = replace(ONE, exits={}, blocks=(1.0, 2.0, 4.0, 8.0))
    cost = CostModel(8, 4, one, replace(one, blocks=(2.0, 4.0, 8.0, 16.0)), 16.0)
    assert CostModel.from_description(json.loads(json.dumps(cost.describe()))) == cost
    assert [cost.step_seconds(Step(depth)) for depth in (1, 2, 4)] == [17.75, 19.75, 16.25 + 15 + 0.125]
    assert cost.step_seconds(Step.parse("2|4")) == 16.25 + (2 + 4) + 0.5 + (4 + 8) + 0.125


@pytest.mark.parametrize("several", [False, True])
def test_blocks_are_timed_by_their_kind(several: bool, make_model, monkeypatch) -> None:
    """On a clock that only blocks move: block i takes 2^i seconds; 1 and 3 are of another kind."""
    model, now = make_model((2,)), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    block = type(model.backbone).block

    def passes(self, index: int, state):
        now[0] += 2**index
        return block(self, index, state)

    monkeypatch.setattr(type(model.backbone), "block", passes)
    if several:
        kinds = tuple(index in (1, 3) for index in range(model.num_blocks))
        monkeypatch.setattr(type(model.backbone), "block_kinds", lambda self: kinds)
    found, num = measure_cost(model, batch_size=2, rounds=1), model.num_blocks
    for parts in (found.one, found.two):
        assert parts.block == (2**num - 1) / num
        others = [2**i for i in range(num) if i not in (1, 3)]
        mean = sum(others) / len(others)
        assert parts.blocks == (tuple(5.0 if i in (1, 3) else mean for i in range(num)) if several else ())


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_timed_by_their_shapes_and_equal_ones_once(head: str, make_model, monkeypatch) -> None:
    """On a clock that only exits move: 2^depth seconds each."""
    model, now, called = make_model((), head), [0.0], set()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_time(depth: int) -> None:
        now[0] += 2**depth
        called.add(depth)

    for depth in model.exits.layers:
        model.exits.heads[str(depth)].register_forward_hook(lambda *_, depth=depth: pass_time(depth))
    found = measure_cost(model, batch_size=2, rounds=1)
    assert (found.one.embed, found.one.block, found.one.head) == (0, 0, 0)
    for parts in (found.one, found.two):
        assert parts.exit == 2
        assert parts.exits == ({3: 8, 4: 8, 5: 32} if head == "wide" else {})
    assert called == ({1, 3, 5} if head == "wide" else {1})


def test_a_model_without_exits_is_timed(make_model) -> None:
    model = make_model()
    model.exits = None
    found = measure_cost(model, batch_size=2, rounds=1)
    assert found.one.exits == {}
    assert found.one.exit > 0
