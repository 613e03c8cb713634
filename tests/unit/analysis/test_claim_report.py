"""The report of a claim: calibrations joined, known answers, the protocol's sentences, nothing averaged silently."""

import random
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndit.analysis.report.claim_goals import goals, sentences, summary
from dyndit.analysis.report.claim_tables import goals_table, normalised, tables_of_claim
from dyndit.analysis.report.claims import BETTER, EXPLAINING, OPEN, PRIMARY, RIVALS, WORSE, Claim, claims_of, is_claim
from dyndit.analysis.report.contents import contents_of, table_record
from dyndit.analysis.report.figures import frontier_figure, headline_figure
from dyndit.analysis.report.runs import append_run, runs_below
from dyndit.analysis.report.verify import verify
from dyndit.analysis.report.write import write_report
from dyndit.cli import results
from dyndit.errors import InputError
from dyndit.stats import holm
from support.claims import EXTRACTORS, FAMILIES, claim_of, rows_of, runs_of
from support.runs import run_row


def by_letter(claim: Claim, extractor: str = PRIMARY, arms=RIVALS) -> dict[str, dict]:
    return {row["letter"]: row for row in claim.comparisons(extractor, arms).to_dict("records")}


def test_joined_extractors_judge_nothing() -> None:
    runs, joined = runs_of(), "resnet20-cifar10+vgg-cifar10"
    more = [rows[rows["extractor"] == "vgg-cifar10"].assign(extractor=joined, fd=99.0) for rows in runs]
    (claim,) = claims_of([pd.concat(both) for both in zip(runs, more, strict=True)], 0.03)
    assert claim.extractors == claim_of().extractors
    assert sentences(claim) == sentences(claim_of())
    assert goals(claim) == goals(claim_of())


def fds(family: str, changes: dict[str, dict] | None = None) -> list[float]:
    rows = pd.concat(runs_of(changes))
    rows = rows[(rows["family"] == family) & (rows["extractor"] == PRIMARY) & (rows["role"] == "score")]
    return list(rows.sort_values("calibration")["fd"])


def test_differences_intervals_and_p_values_are_the_paired_t_tests() -> None:
    found, plan = by_letter(claim_of()), fds("searched")
    expected = {letter: scipy.stats.ttest_rel(plan, fds(family)) for letter, (family, _) in RIVALS.items()}
    corrected = holm({letter: test.pvalue for letter, test in expected.items()})
    for letter, test in expected.items():
        row, interval = found[letter], test.confidence_interval()
        assert row["diff"].low == pytest.approx(interval.low)
        assert row["diff"].high == pytest.approx(interval.high)
        assert row["p"] == pytest.approx(test.pvalue)
        assert row["corrected"] == pytest.approx(corrected[letter])
        assert (row["ratio"], row["outcome"], row["calibrations"], row["note"]) == (1.0, BETTER, 5, "")
    assert len({row["p"] for row in found.values()}) > 2


def test_explaining_arms_are_corrected_among_themselves() -> None:
    found, plan = by_letter(claim_of(), arms=EXPLAINING), fds("searched")
    values = {k: scipy.stats.ttest_rel(plan, fds(family)).pvalue for k, (family, _) in EXPLAINING.items()}
    assert {k: row["corrected"] for k, row in found.items()} == pytest.approx(holm(values))


def test_what_was_met_is_said_in_the_protocols_words() -> None:
    claim = claim_of()
    assert [goal.met for goal in goals(claim)] == [True] * 7
    first, second, *rest = sentences(claim)
    wanted = "(3%, five calibrations, three extractors)"
    assert first == f"A searched plan saves 55 ± 0% of the time at unchanged quality {wanted}."
    assert second == "At equal time it is better than each of nine alternatives."
    assert rest == []


WORSE_BY_VGG = {"searched": {"fd": 10.6}}
SLOW = {family: {"ms": 65.0} for family in ("searched", *FAMILIES.values())}
OUTCOMES = [
    (WORSE_BY_VGG, 0, "At 55 ± 0% of the time saved, quality is not shown to be unchanged by "),
    (WORSE_BY_VGG, 0, "vgg-cifar10: FD is 5."),
    (WORSE_BY_VGG, 0, "% higher (upper limit +"),
    (
        {"searched": {"ms": 65.0}, **{f: {"ms": 65.0} for f in FAMILIES.values()}},
        0,
        "A searched plan saves 35 ± 0% of the",
    ),
    ({"searched": {"ms": 65.0}, **{f: {"ms": 65.0} for f in FAMILIES.values()}}, 0, "(goal: 40% in every batch size)"),
    ({"searched": {"precision": 0.65}}, 0, ", and precision falls by 0.0"),
    (
        {"B": {"fd": 9.0}},
        0,
        "B, full depth in fewer steps is better than the searched plan at equal time (difference +1.",
    ),
    (
        {"B": {"fd": 9.0}},
        2,
        "It is not shown to be better than B, full depth in fewer steps at equal time (difference +1.",
    ),
    (
        {"D": {"fd": lambda c: 9.0 + c % 2 * 4}},
        1,
        "It is not shown to be better than D, the same heads without a search at",
    ),
    (
        {"C": {"fd": 10.15}},
        -1,
        "The timestep-aware plan is not what saves the time; guidance by an own exit at full depth",
    ),
    ({"D": {"fd": 10.15}}, -1, "not what saves the time; the same heads without a search does nearly as well."),
    ({"H": {"fd": 10.15}}, -1, "not what saves the time; a smaller student does nearly as well."),
    ({"shuffled": {"fd": lambda c: 10 + c % 2 * 0.3}}, -1, "The order of the steps does not matter"),
    ({"K": None}, 2, "K, a pruned backbone has no arm within the time; it left the comparison."),
    ({"J": {"ms": 55.0, "fd": 10.1}}, 1, "(difference +0.0"),
]


@pytest.mark.parametrize(("changes", "place", "text"), OUTCOMES)
def test_every_outcome_has_its_sentence(changes: dict, place: int, text: str) -> None:
    found = sentences(claim_of(changes))
    assert text in found[place], found
    assert not any("at unchanged quality" in sentence for sentence in found if changes is WORSE_BY_VGG)


@pytest.mark.parametrize("below", [0, 2])
@pytest.mark.parametrize("changes", [{}, *(changes for changes, _, _ in OUTCOMES)])
def test_the_summary_says_what_the_sentences_say(changes: dict, below: int) -> None:
    claim = claim_of(changes)
    whole, short = sentences(claim), summary(claim, below)
    apart = [sentence for sentence in whole if sentence.startswith("It is not shown")]
    joined = [sentence for sentence in short if sentence.startswith("It is not shown")]
    assert [sentence for sentence in short if sentence not in joined] == [s for s in whole if s not in apart]
    assert len(joined) == min(len(apart), 1)
    strongest = list(claim.comparisons(PRIMARY)["letter"])[:below]
    for sentence in apart:
        rival, rest = sentence.removeprefix("It is not shown to be better than ").split(" at equal time (difference ")
        letter = rival.split(",")[0]
        told = f"{letter} (below)" if letter in strongest else f"{rival} ({rest.split(',')[0]})"
        assert told in joined[0]


def test_goals_are_missed_where_they_are_missed() -> None:
    assert [goal.met for goal in goals(claim_of(WORSE_BY_VGG))] == [False] * 3 + [True] * 2 + [True, True]
    assert [goal.met for goal in goals(claim_of(SLOW))][3:5] == [False, False]
    assert goals(claim_of({"searched": {"precision": 0.65}}))[-1].met is False
    assert goals(claim_of({"B": {"fd": 10.1}}))[5].met is False
    assert goals(claim_of({"K": None}))[5].measured == "better than 8 of 8"


def test_a_missing_row_is_named_and_its_comparison_left_out() -> None:
    runs = runs_of()
    runs[3] = runs[3][~((runs[3]["family"] == "D") & (runs[3]["extractor"] == PRIMARY))]
    (claim,) = claims_of(runs, 0.03)
    whole, found = by_letter(claim_of()), by_letter(claim)
    assert found["D"]["note"] == "left out: no row for calibration 3"
    assert (found["D"]["outcome"], str(found["D"]["diff"]), found["D"]["calibrations"]) == ("", "–", 4)
    assert all(found[k]["diff"] == whole[k]["diff"] for k in RIVALS if k != "D")
    assert found["B"]["corrected"] == whole["B"]["corrected"]  # it still counts as a comparison
    assert (
        "not shown to be better than D, the same heads without a search at equal time (left out: no row"
        in sentences(claim)[1]
    )
    goal = goals(claim)[5]
    assert (goal.met, goal.measured) == (False, "better than 8 of 9")
    assert by_letter(claim, "vgg-cifar10")["D"]["outcome"] == BETTER
    lost = [frame[frame["family"] != "searched"] if k == 2 else frame for k, frame in enumerate(runs_of())]
    (claim,) = claims_of(lost, 0.03)
    assert {row["note"] for row in by_letter(claim).values()} == {"left out: no row for calibration 2"}
    assert {goal.met for goal in goals(claim) if not goal.name.startswith("3")} == {None}
    assert not any("at unchanged quality" in sentence for sentence in sentences(claim))


def test_one_calibration_says_so_and_judges_nothing() -> None:
    claim = claim_of(num=1)
    assert {goal.met for goal in goals(claim)} == {None}
    assert sentences(claim) == ["One calibration: nothing is shown. The searched plan saves 55% of the time."]
    assert {row["outcome"] for row in by_letter(claim).values()} == {OPEN}
    assert "one calibration" in goals_table(claim).caption


MIXED = {"B": {"fd": 10.2}, "C": {"ms": 40.0}, "D": {"fd": lambda c: 9.0 + c % 2 * 4}}
FRAMES = runs_of(MIXED)


@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_nothing_depends_on_the_order_of_rows_or_runs(seed: int) -> None:
    drawn, (whole,) = random.Random(seed), claims_of(FRAMES, 0.03)
    shuffled = [frame.sample(frac=1, random_state=drawn.randrange(2**31)) for frame in FRAMES]
    drawn.shuffle(shuffled)
    (other,) = claims_of(shuffled, 0.03)
    made = [list(map(table_record, tables_of_claim(claim, "vgg-cifar10"))) for claim in (whole, other)]
    assert made[0] == made[1]
    assert sentences(other) == sentences(whole)
    (joined,) = claims_of([pd.concat(shuffled[:3]), *shuffled[3:]], 0.03)  # calibrations in one file
    assert sentences(joined) == sentences(whole)


@given(st.dictionaries(st.sampled_from(sorted(RIVALS)), st.floats(0, 1), min_size=1))
def test_correction_is_monotone(values: dict[str, float]) -> None:
    """The order of the p values stays, none falls, and none grows when another falls."""
    found = holm(values)
    ranked = sorted(values, key=values.get)
    assert all(found[a] <= found[b] for a, b in pairwise(ranked))
    assert all(values[name] <= found[name] <= 1 for name in values)
    assert found[ranked[0]] == pytest.approx(min(1, len(values) * values[ranked[0]]))
    lower = holm(values | {ranked[-1]: values[ranked[-1]] / 2})
    assert all(lower[name] <= found[name] + 1e-12 for name in values)


def test_a_rival_of_more_time_is_named() -> None:
    """It is better, but not at equal time; a rival that loses all the same has lost."""
    changes = {"ecad": {"ms": 50.0, "fd": 9.0}, "K": {"ms": 50.0}, "B": {"fd": 9.0}, "C": {"ms": 36.0, "fd": 12.0}}
    found = by_letter(claim_of(changes | {"J": {"ms": 45.8}}))
    assert found["I"]["note"] == found["K"]["note"] == "more time: 0, 1, 2, 3, 4"
    assert (found["C"]["note"], found["C"]["ratio"]) == ("less time: 0, 1, 2, 3, 4", pytest.approx(0.8))
    assert found["J"]["note"] == ""
    assert found["I"]["corrected"] < 0.05
    assert [found[letter]["outcome"] for letter in "IKB"] == [OPEN, BETTER, WORSE]


def test_calibrations_of_several_machines_are_one_claim() -> None:
    """Times are compared within a calibration: another machine may be twice as fast."""
    runs, one = runs_of(), claim_of()
    runs[4] = runs[4].assign(machine="gpu", ms_per_picture=runs[4]["ms_per_picture"] / 2)
    (claim,) = claims_of(runs, 0.03)
    assert claim.calibrations == (0, 1, 2, 3, 4)
    assert sentences(claim) == sentences(one)
    assert claim.saved()[0].mean == pytest.approx(one.saved()[0].mean)


def test_an_arm_is_compared_with_the_plan_of_its_own_run() -> None:
    """The plan was drawn again beside H to L, on a faster machine, and came out better by 0.5."""
    later = {"H", "ecad", "J", "K", "L"}
    split = []
    for frame in runs_of():
        mine = frame["family"].isin(later | {"searched"})
        second = frame[mine].assign(machine="gpu", run=frame["run"] + "-rivals")
        second["ms_per_picture"] /= 2
        second.loc[second["family"] == "searched", "fd"] -= 0.5
        split += [frame[~frame["family"].isin(later)], second]
    (claim,) = claims_of(split, 0.03)
    one = claim_of()
    found, before = (by_letter(each, arms=RIVALS | EXPLAINING) for each in (claim, one))
    for letter, family in FAMILIES.items():
        moved = -0.5 if family in later else 0.0
        assert found[letter]["diff"].mean == pytest.approx(before[letter]["diff"].mean + moved)
        assert found[letter]["ratio"] == pytest.approx(before[letter]["ratio"])
        assert found[letter]["note"] == before[letter]["note"] == ""
    assert [(goal.name, goal.measured) for goal in goals(claim)][:5] == [
        (goal.name, goal.measured) for goal in goals(one)
    ][:5]
    assert len(normalised(claim, PRIMARY)) == len(normalised(one, PRIMARY))
    with pytest.raises(InputError, match=r"calibration 0, family H: two rows by .*; expected one"):
        claims_of([*split, split[1].assign(run="again")], 0.03)


def test_replications_are_claims_of_their_own() -> None:
    """Ten steps leave less to save, so 30% are asked for."""
    few = [frame.assign(steps=10) for frame in runs_of({"searched": {"ms": 65.0}})]
    found = {claim.point: goals(claim)[3] for claim in claims_of([*runs_of(), *few], 0.03)}
    assert {point: (goal.met, goal.asked[-3:]) for point, goal in found.items()} == {
        "unipc, 20 steps": (True, "40%"),
        "unipc, 10 steps": (True, "30%"),
    }


def test_a_calibration_that_stands_twice_is_refused() -> None:
    runs = runs_of()
    with pytest.raises(InputError, match=r"calibration 2, family A: two rows by .* \(claim-2\); expected one"):
        claims_of([*runs, runs[2]], 0.03)


def test_without_the_primary_extractor_rivals_are_not_judged() -> None:
    runs = [frame[frame["extractor"] != PRIMARY] for frame in runs_of()]
    (claim,) = claims_of(runs, 0.03)
    assert [goal.met for goal in goals(claim)] == [True, True, True, True, None, None]
    assert sentences(claim)[-1] == f"Not scored by {PRIMARY}, which decides about rivals: they are not judged."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(5):
        place = tmp_path / "claim" / str(k) / "claim" / "runs.csv"
        place.parent.mkdir(parents=True)
        append_run(place, *rows_of(k, {"B": {"fd": 10.2}}))
    return tmp_path / "claim"


def test_a_folder_of_calibrations_is_one_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(runs_below(folder)) == 5
    results.report((folder,), margin=0.03)
    said = capsys.readouterr().out
    assert "A searched plan saves 55 ± 0% of the time at unchanged quality (3%, five" in said.replace("\n", " ")
    assert f"report: {folder / 'report.html'}" in said
    text = (folder / "report.md").read_text()
    for wanted in ("### Goals", "### Rivals at equal time", "### What the plan is made of", "### Arms"):
        assert wanted in text
    assert text.count("### Rivals at equal time") == len(EXTRACTORS)
    assert text.count("### Goals") == 1
    assert "One calibration" not in text
    assert "in every calibration." in text
    assert "in every seed block." not in text, "calibrations are what the figure shows"
    assert verify(folder) == []
    (folder / "report.md").write_text(text.replace("| met |", "| missed |", 1))
    assert any("'missed', recomputed 'met'" in line for line in verify(folder))


def test_one_run_of_a_claim_is_a_report_too(folder: Path, tmp_path: Path) -> None:
    (run, *_) = runs_below(folder)
    write_report(run, tmp_path / "out", margin=0.03)
    assert "One calibration: nothing is shown." in (tmp_path / "out" / "report.md").read_text()
    assert verify(tmp_path / "out") == []


def test_other_runs_stand_beside_a_claim(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "runs.csv"
    other.parent.mkdir()
    plain = [run_row(arm="full-8", steps=8), run_row(arm="full-4", steps=4, ms_per_picture=5.0, fd=9.0)]
    append_run(other, *plain)
    assert not is_claim(pd.DataFrame(plain))
    assert all(is_claim(frame[frame["family"] != "searched"]) for frame in runs_of())  # it is missed, not left out
    contents = contents_of([*runs_below(folder), other], 0.03)
    assert [bool(content.claim) for content in contents] == [True] * 3 + [False]
    write_report([*runs_below(folder), other.parent], tmp_path / "out", margin=0.03)
    assert verify(tmp_path / "out") == []


def test_a_claims_figure_shows_every_arm() -> None:
    claim = claim_of({"full": None, "searched-E2": {"fd": 17.0}, "H": {"fd": 60.0}})
    rows = normalised(claim, PRIMARY)
    assert headline_figure(rows) is None, "the frontier is the one figure"
    (axis,) = frontier_figure(rows).axes
    low, high = axis.get_ylim()
    assert low < rows["fd"].min()
    assert rows.loc[rows["family"] == "searched-E2", "fd"].max() < high < 60
    assert [text.get_text() for text in axis.texts if "↑" in text.get_text()] == ["↑61"], "at the edge, with its FD"


def test_figures_draw_an_arm_of_another_run_at_its_share_of_that_runs_plan() -> None:
    rows = pd.DataFrame(rows_of(0, {"full": None}))
    other = rows[rows["family"].isin(["H", "searched"])].assign(run="rivals-0")  # half as fast a machine
    other = other.assign(ms_per_picture=2 * other["ms_per_picture"], ms_denoiser=2 * other["ms_denoiser"])
    (claim,) = claims_of([rows[rows["family"] != "H"], other], 0.03)
    drawn = normalised(claim, PRIMARY).set_index("family")["ms_per_picture"]
    assert drawn.index.is_unique
    assert drawn["H"] == pytest.approx(drawn["searched"])
    assert drawn["searched"] == pytest.approx(45.0)
