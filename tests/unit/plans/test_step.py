"""Steps: what they print is what is read, what they say runs is what runs, and what cannot run is refused."""

import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndit.errors import PlanError
from dyndit.models.dynamic import Work
from dyndit.plans.step import STRONGEST, WEAKEST, Guide, Held, NoGuide, OwnExit, Step, Unconditional, locked, steps

EXAMPLES = {
    "12": (Step(12), Work((12,))),
    "12|6": (Step(12, Unconditional(6)), Work((12, 6))),
    "6|12": (Step(6, Unconditional(12)), Work((6, 12))),
    "8|e4": (Step(8, OwnExit(4)), Work((8,), own_exit=4)),
    "8|held": (Step(8, Held()), Work((8,), held=True)),
    "4+": (Step(4, forecast=True), Work((4,), forecast=True)),
    "4+|held": (Step(4, Held(), forecast=True), Work((4,), held=True, forecast=True)),
    "12|6*1.5": (Step(12, Unconditional(6), strength=1.5), Work((12, 6), strength=1.5)),
    "8|e4*2": (Step(8, OwnExit(4), strength=2.0), Work((8,), own_exit=4, strength=2.0)),
    "4+|held*0.5": (Step(4, Held(), True, 0.5), Work((4,), held=True, forecast=True, strength=0.5)),
    "4+|e2": (Step(4, OwnExit(2), forecast=True), Work((4,), own_exit=2, forecast=True)),
}


@st.composite
def valid_steps(draw: st.DrawFn) -> Step:
    """Any valid step."""
    depth = draw(st.integers(1, 40))
    guides: st.SearchStrategy[Guide] = st.sampled_from([NoGuide(), Held()]) | st.integers(1, 40).map(Unconditional)
    if depth > 1:
        guides |= st.integers(1, depth - 1).map(OwnExit)
    guide = draw(guides)
    strength = 1.0 if guide == NoGuide() else draw(st.just(1.0) | st.floats(WEAKEST, STRONGEST))
    return Step(depth, guide, not isinstance(guide, Unconditional) and draw(st.booleans()), strength)


def of_version_1(step: Step) -> tuple[int, int]:
    """The two whole numbers that a plan of version 1 has for a step."""
    cond = -step.depth if step.forecast else step.depth
    match step.guide:
        case Unconditional(depth):
            return cond, depth
        case OwnExit(depth):
            return cond, -1 - depth
        case Held():
            return cond, -1
    return cond, 0


@given(step=valid_steps())
def test_a_step_is_read_from_what_it_prints(step: Step) -> None:
    assert Step.parse(str(step)) == step
    assert len({step, Step.parse(str(step))}) == 1


@given(one=valid_steps(), other=valid_steps())
def test_steps_that_differ_print_differently(one: Step, other: Step) -> None:
    assert (str(one) == str(other)) == (one == other)


@given(step=valid_steps())
def test_the_whole_numbers_of_version_1_are_the_same_step(step: Step) -> None:
    assert Step.of_version_1(*of_version_1(step)) == replace(step, strength=1.0)


@given(cond=st.integers(-28, 28).filter(bool), uncond=st.integers(-28, 28))
def test_every_pair_of_version_1_is_a_step_or_refused(cond: int, uncond: int) -> None:
    depth, guide = abs(cond), -1 - uncond
    possible = not (cond < 0 < uncond) and guide < depth
    if possible:
        assert of_version_1(Step.of_version_1(cond, uncond)) == (cond, uncond)
    else:
        with pytest.raises(PlanError):
            Step.of_version_1(cond, uncond)


@pytest.mark.parametrize("text", EXAMPLES)
def test_what_a_step_prints_and_runs(text: str) -> None:
    step, work = EXAMPLES[text]
    assert str(step) == text
    assert Step.parse(text) == step
    assert step.work() == work
    assert steps("1", text) == (Step(1), step)


@given(step=valid_steps())
def test_the_work_of_a_step_is_its_branches_and_heads(step: Step) -> None:
    work = step.work()
    assert work.depths[0] == step.depth
    assert (len(work.depths) == 2) == isinstance(step.guide, Unconditional)
    assert work.blocks == step.depth + (step.guide.depth if isinstance(step.guide, Unconditional) else 0)
    assert work.heads_on_the_way == ((step.guide.depth,) if isinstance(step.guide, OwnExit) else ())
    assert (work.held, work.forecast, work.strength) == (step.guide == Held(), step.forecast, step.strength)
    assert set(step.exits) == {step.depth, getattr(step.guide, "depth", step.depth)}


def test_numbers_of_other_kinds_are_strengths_too() -> None:
    assert str(Step(8, OwnExit(4), strength=np.float32(0.5))) == "8|e4*0.5"
    assert str(Step(8, OwnExit(4), strength=2)) == "8|e4*2"
    assert Step(8, OwnExit(4), strength=1) == Step(8, OwnExit(4))


def test_kept_gaps_are_heads_on_the_way_and_rise() -> None:
    work = Step.parse("12|e4").work()
    assert work.keeping((8, 2)).keeping((2,)) == replace(work, kept=(2, 8))
    assert work.keeping((8, 2)).heads_on_the_way == (2, 4, 8)
    assert work.keeping((4,)).heads_on_the_way == (4,)  # one head serves both
    assert work.keeping(()) == work
    assert work.keeping((8, 2)).blocks == 12


@given(step=valid_steps())
def test_a_guide_is_taken_away_with_its_strength(step: Step) -> None:
    assert step.unguided() == Step(step.depth, forecast=step.forecast)


@pytest.mark.parametrize("guided", [False, True])
def test_equal_depths(guided: bool) -> None:
    assert str(Step.equal(7, guided)) == ("7|7" if guided else "7")


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0", "-4", "+4", "4.0", "1e1", "x", "012", "４", "4 ", " 4", "4\n", "four", "4++", "+", "|", "|4"),
        *("4|", "4|0", "4|-1", "4|06", "4|4|4", "4|e", "4|e0", "4|e-1", "4|E2", "4|2e", "4|hold", "4|heldx", "4||2"),
        *(
            "4+|",
            "4|2+",
            "4|held+",
            "held",
            "e4",
            "4,2",
            "4*2",
            "4|2*",
            "4|2*1",
            "4|2*1.50",
            "4|2*02",
            "4|2*.5",
            "4|2*-1",
            "4|2*nan",
            "4+*2",
            "(4, 2)",
            "9" * 60 + "x",
        ),
        *(None, 4, 4.0, b"4", ("4",), Step(4)),
    ],
    ids=repr,
)
def test_what_is_no_step_is_refused(text: object) -> None:
    with pytest.raises(PlanError, match=r"^step .*: expected a depth such as") as caught:
        Step.parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 120


@given(text=st.text(alphabet="0123456789+|eheld* .-\n٤", max_size=8))
def test_a_text_is_the_step_that_prints_it_or_refused(text: str) -> None:
    try:
        found = Step.parse(text)
    except PlanError:
        return
    assert str(found) == text


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Step(0), "step 0: expected whole depths of at least 1"),
        (lambda: Step(-4), "step -4: expected whole depths"),
        (lambda: Step(4.0), "step 4.0: expected whole depths"),
        (lambda: Step(True), "step True: expected whole depths"),
        (lambda: Step(None), "step None: expected whole depths"),
        (lambda: Step("4"), "step 4: expected whole depths"),
        (lambda: Step(4, Unconditional(0)), "step 4|0: expected whole depths"),
        (lambda: Step(4, Unconditional(2.0)), "step 4|2.0: expected whole depths"),
        (lambda: Step(4, OwnExit(0)), "step 4|e0: expected whole depths"),
        (lambda: Step(4, OwnExit(-1)), "step 4|e-1: expected whole depths"),
        (lambda: Step(4, OwnExit(4)), "step 4|e4: guided by its own exit at 4, expected one below 4"),
        (lambda: Step.parse("4|e5"), "step 4|e5: guided by its own exit at 5, expected one below 4"),
        (lambda: Step.parse("1|e1"), "step 1|e1: guided by its own exit at 1, expected one below 1"),
        (lambda: Step.parse("4+|2"), "step 4+|2: forecasts beside an unconditional pass; expected none"),
        (lambda: Step.of_version_1(-4, 2), "step 4+|2: forecasts beside an unconditional pass"),
        (lambda: Step.of_version_1(0, 0), "step 0: expected whole depths"),
        (lambda: Step(4, strength=2.0), "step 4: guidance of strength 2 without a guide, expected 1"),
        (lambda: Step(4, Held(), strength=0.0), "step 4: guidance of strength 0.0, expected a number from 0.01 to 100"),
        (lambda: Step(4, Held(), strength=float("inf")), "step 4: guidance of strength inf, expected a number"),
        (lambda: Step(4, Held(), strength="2"), "step 4: guidance of strength '2', expected a number"),
        (lambda: Step.parse("4|2*0"), "step 4: guidance of strength 0.0, expected a number from 0.01 to 100"),
        (lambda: Step(12, 6), "step 12: guide 6, expected a `Guide`"),  # it would print as "12|6" and not be guided
        (lambda: Step(12, None), "step 12: guide None, expected a `Guide`"),
        (lambda: Step(12, Held), "step 12: guide <class"),
        (lambda: replace(Step.parse("4+"), guide=Unconditional(2)), "step 4+|2: forecasts beside"),
    ],
)
def test_impossible_steps_are_refused(make, named: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(named)}"):
        make()


def test_a_step_is_a_value() -> None:
    step = Step.parse("8|e4")
    with pytest.raises(FrozenInstanceError):
        step.depth = 9
    assert {step: 1}[Step.parse("8|e4")] == 1
    assert Step(4).guide == NoGuide()


def test_choices_that_are_locked_to_a_guide_have_it_or_drop_out() -> None:
    assert locked(("12|6", "8"), OwnExit(4)) == steps("12|e4", "8|e4")
    assert locked(("4", "2", "8+", "8+|e2"), OwnExit(4)) == steps("8+|e4")  # not deeper than it; the same
    assert locked(("12", "8|2", "4+"), Unconditional(12)) == steps("8|12")  # the original; a forecast
    assert locked((Step(4), "8+|e2"), Held()) == steps("4|held", "8+|held")
    assert locked(("12|6", "12|6*2", "8|e2*0.5"), OwnExit(4)) == steps("12|e4", "8|e4")  # strengths are guidance too
