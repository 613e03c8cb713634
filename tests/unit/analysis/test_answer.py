"""The first screen answers in a sentence, a table and a picture; verdicts say when there is none."""

import itertools
import re
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dyndit.analysis.report import strips
from dyndit.analysis.report.calibrations import by_plan, calibration_findings
from dyndit.analysis.report.cells import as_markdown
from dyndit.analysis.report.figures import error_figure, frontier_figure
from dyndit.analysis.report.findings import headlines, unrecorded_findings
from dyndit.analysis.report.frontier import KEPT, LOST, NO_VERDICT, NONE, OPEN, summary
from dyndit.analysis.report.headline import SPEED, glance_of, sentences
from dyndit.analysis.report.plan_figures import plan_figure
from dyndit.analysis.report.runs import append_run, read_runs
from dyndit.analysis.report.savings import bias_findings, predictions, with_parts
from dyndit.analysis.report.style import save
from dyndit.analysis.report.tables import arms_table, markdown_table, tables_of
from dyndit.analysis.report.terminal import show
from dyndit.analysis.report.verify import read_html, read_markdown, verify
from dyndit.analysis.report.write import write_report
from dyndit.cli import results
from dyndit.errors import InputError
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import steps
from dyndit.stats import paired_interval
from support.fences import fences, pages
from support.runs import frame

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def verdict(runs: pd.DataFrame, margin: float = 0.05) -> str:
    table = summary(runs, margin)
    return table[table["arm"] == "searched"].iloc[0]["verdict"]


def written(tmp_path: Path, runs: pd.DataFrame) -> Path:
    """A folder with these rows, and its report in it."""
    tmp_path.mkdir(exist_ok=True)
    runs.to_csv(tmp_path / "runs.csv", index=False)
    write_report(tmp_path, tmp_path)
    return tmp_path


def on_terminal(folder: Path, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    show(folder, 0.05, console)
    return console.export_text()


def test_one_seed_block_gives_no_verdict_anywhere(tmp_path: Path) -> None:
    runs = frame(ms=5.0, fd=12.0, num_blocks=1)
    row = summary(runs).iloc[-1]
    assert (row["verdict"], row["unchanged"]) == (NONE, None)
    folder = written(tmp_path / "run", runs)
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")]
    for text in (*texts, " ".join(on_terminal(folder).split()), headlines(summary(runs))[0]):
        assert NO_VERDICT in text.lower()
        assert "unchanged quality" not in text
    cells = [line.split("|")[10].strip() for line in texts[0].splitlines() if line.startswith("| searched | ddim")]
    assert cells == ["no verdict"]
    assert verify(folder) == []


def test_no_says_worse_and_not_shown_says_draw_more() -> None:
    assert verdict(frame(ms=5.0, fd=12.0)) == KEPT
    assert verdict(frame(ms=5.0, fd=14.0, noise=0.01)) == LOST
    undecided = frame(ms=5.0, fd=12.5, noise=2.0)
    assert verdict(undecided) == OPEN
    assert "1 of 1 plan undecided: draw more" in sentences(undecided, 0.05)[0]
    assert "1 of 1 plan worse by more than that" in sentences(frame(ms=5.0, fd=14.0), 0.05)[0]
    assert summary(undecided).iloc[-1]["unchanged"] is False


def test_the_sentence_says_how_much_faster_and_against_what() -> None:
    assert sentences(frame(ms=5.0, fd=12.0, noise=0.01), 0.05) == [
        "38% of the time is saved at unchanged quality: 5.00 ms a picture where full depth at the same 8 steps of ddim "
        "takes 8.00; against full depth with fewer steps at equal FD, 37 ± 0%.",
        "searched: FD-digits +0.00 ± 0.01, margin 5%; calibrations not recorded.",
    ]
    assert "the best of 9 plans, chosen on these very pictures" in sentences(read_runs(RESULTS / "cifar10"), 0.03)[1]
    assert sentences(frame(ms=5.0, fd=12.0, steps=9), 0.05) == [
        "No verdict: full depth was not measured at the steps of any plan.",
        "",
    ]
    full = frame(ms=5.0, fd=12.0)
    assert "nothing to compare" in sentences(full[full["family"] == "full"], 0.05)[0]


def test_several_extractors_have_a_sentence_each_and_shared_figures_once(tmp_path: Path) -> None:
    runs = frame(ms=5.0, fd=12.0, noise=0.05)
    other = runs.assign(extractor="other", metric="FD-other", fd=runs["fd"] + 4 * (runs["family"] == "searched"))
    folder = written(tmp_path / "run", pd.concat([runs, other]))
    section = read_markdown((folder / "report.md").read_text(encoding="utf-8"))[0]
    assert section.title == SPEED
    assert [finding.split(":")[0] for finding in section.findings] == ["FD-digits", "searched", "FD-other", "Nearest"]
    assert "FD-other: no plan is shown to keep" in section.findings[2]
    names = {path.name for path in folder.glob("*.png")}
    assert {"frontier-1.png", "frontier-2.png", "spread-1.png", "spread-2.png", "time-1.png"} == names
    assert verify(folder) == []


def test_the_first_screen_comes_first(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", frame(ms=5.0, fd=12.0, noise=0.05))
    page = (folder / "report.html").read_text(encoding="utf-8")
    places = [page.index(mark) for mark in (SPEED, 'class="lead"', "<table", "<figure", "Lower FD is better", ">Runs<")]
    assert places == sorted(places)
    assert page.count("<figure") == 3
    first = read_html(page)[0]
    assert (first.title, len(first.findings), len(first.tables)) == (SPEED, 2, 1)
    assert "calibrations not recorded" in first.findings[1]


def test_an_edited_answer_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", frame(ms=5.0, fd=12.0, noise=0.05))
    for name, old, new in (
        ("report.md", "38% of the time", "83% of the time"),
        ("report.html", "38% of the time", "83% of the time"),
        ("report.json", "38% of the time", "83% of the time"),
        ("report.md", "| ddim 8 | searched | 5.00 |", "| ddim 8 | searched | 4.00 |"),
    ):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")
        assert len(verify(folder)) == 1
        (folder / name).write_text(text, encoding="utf-8")


def test_the_rival_is_the_best_other_arm_in_the_time() -> None:
    runs = frame(ms=5.0, fd=12.0)
    best = glance_of(summary(runs), runs, 0.05).best.iloc[0]
    assert (best["rival"], best["rival_fd"].mean) == ("full-4", pytest.approx(4.0))
    fast = frame(ms=3.0, fd=12.0)
    assert glance_of(summary(fast), fast, 0.05).best.iloc[0]["rival"] == ""


@given(
    steps=st.integers(1, 16),
    cond=st.floats(0, 12),
    uncond=st.floats(0, 12),
)
def test_parts_of_a_saving_add_up(steps: int, cond: float, uncond: float) -> None:
    depths = {"mean_depth_cond": cond, "mean_depth_uncond": uncond}
    parts = with_parts(summary(frame(ms=5.0, fd=12.0, steps=steps, num_blocks=2, **depths))).iloc[-1]["parts"]
    assert parts.total == pytest.approx(parts.steps + parts.unconditional + parts.conditional)
    assert parts.total == pytest.approx(1 - steps * (cond + uncond) / (16 * 24))
    assert parts.steps == pytest.approx(1 - steps / 16)


def test_parts_are_printed_in_points_and_full_depth_saves_by_steps() -> None:
    runs = frame(ms=5.0, fd=12.0, steps=16, mean_depth_cond=9.0, mean_depth_uncond=0.0)
    table = with_parts(summary(runs)).set_index("arm")["parts"]
    assert str(table["searched"]) == "62% = 0 + 50 + 12"
    assert str(table["full-4"]) == "75% = 75 + 0 + 0"
    assert table["full-16"] is None
    assert "| 62% = 0 + 50 + 12 |" in as_markdown(arms_table(with_parts(summary(runs))))


def test_heads_are_counted_beside_all_arithmetic() -> None:
    text = markdown_table(summary(frame(ms=5.0, fd=12.0, macs=4e9, macs_heads=2e8)))
    assert "| 4.00 (8.00) | 0.200 (5%) |" in text
    runs = frame(ms=5.0, fd=12.0)
    assert "exit heads" not in markdown_table(summary(runs))  # a column of dashes says nothing
    (sentence,) = unrecorded_findings(runs)
    assert sentence.startswith("Not recorded in these rows: KID, precision, recall, multiply-accumulates, ")
    assert "number of calibrations" in sentence


def calibrated(*fds: float) -> pd.DataFrame:
    """A plan of one calibration for each FD, and full depth."""
    parts = [
        frame(ms=5.0 + k, fd=fd, noise=0.1, calibration=str(k), arm=f"searched-c{k}", plan="")
        for k, fd in enumerate(fds)
    ]
    return pd.concat([parts[0], *(part[part["family"] == "searched"] for part in parts[1:])], ignore_index=True)


def test_calibrations_are_the_unit_where_there_are_several() -> None:
    runs = calibrated(12.0, 12.6, 12.2)
    table = summary(runs)
    (plan,) = (row for _, row in by_plan(table, 0.05).iterrows())
    means = [value.mean for value in table[table["family"] == "searched"]["fd_diff"]]
    assert plan["calibrations"] == 3
    assert plan["fd_diff"] == paired_interval(means)
    assert plan["time_saved"] == paired_interval(table[table["family"] == "searched"]["time_saved"])
    assert plan["verdict"] == OPEN
    assert verdict(runs.replace({"searched-c0": "searched"})) == KEPT  # its seed blocks alone would say so
    printed = next(t for t in tables_of(table, runs) if t.name == "calibrations")
    assert printed.rows[0][1].text == "3"
    assert "3 calibrations" in calibration_findings(table)[0]


def test_calibrations_may_be_scored_on_seeds_of_their_own() -> None:
    """One block each gives no verdict on an arm, and several calibrations give one on the plan."""
    runs = calibrated(12.0, 12.6, 12.2)
    own = runs[(runs["family"] == "full") | (runs["block"].astype(str) == runs["calibration"])]
    table = summary(own)
    assert set(table[table["family"] == "searched"]["verdict"]) == {NONE}
    (plan,) = (row for _, row in by_plan(table, 0.05).iterrows())
    assert (plan["calibrations"], plan["verdict"]) == (3, OPEN)
    assert "seed block: no verdict" not in " ".join([*sentences(own, 0.05), *headlines(table)]).lower()


def test_one_calibration_is_called_one() -> None:
    runs = calibrated(12.0)
    assert calibration_findings(summary(runs))[0].startswith("One calibration: ")
    assert sentences(runs, 0.05)[1].endswith("; one calibration.")
    assert not any(table.name == "calibrations" for table in tables_of(summary(runs), runs))


def test_rows_of_earlier_runs_say_what_they_do_not_record() -> None:
    runs = read_runs(RESULTS / "cifar10")
    assert runs["macs_heads"].isna().all()
    assert set(runs["calibration"]) == {""}
    assert "the number of calibrations" in unrecorded_findings(runs)[0]
    found = sentences(runs, 0.03)
    assert found[0].startswith("FD-resnet20-cifar10: 70% of the time is saved")
    assert found[2].startswith("FD-vgg-cifar10: 45% of the time is saved")
    assert all("calibrations not recorded" in detail for detail in found[1::2])


def test_predicted_stands_beside_measured_and_the_bias_is_named() -> None:
    table = summary(frame(ms=5.0, fd=12.0, predicted_ms=8.0, predicted_fd=20.0))
    row = predictions(table).set_index("arm").loc["searched"]
    assert (row["ms_ratio"], row["fd_ratio"]) == (5 / 8, pytest.approx(18 / 20))
    found = bias_findings(table)
    assert found == [
        "Predicted time: plans take 38% less time than predicted.",
        "Predicted FD: plans measure 10% lower than predicted.",
    ]
    names = [t.name for t in tables_of(table, frame(ms=5.0, fd=12.0, predicted_ms=8.0, predicted_fd=20.0))]
    assert names[-1] == "predicted and measured"


def test_sets_of_one_seed_stand_side_by_side(tmp_path: Path) -> None:
    runs = frame(ms=5.0, fd=12.0, noise=0.05).assign(labels="balanced")
    folder = written(tmp_path / "run", runs)
    assert not (folder / "side-by-side.png").exists()
    pictures = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for arm in ("full-8", "searched"):
        strips.save(folder, arm, 0, pictures)
    found = strips.shared(folder, runs)
    assert list(found) == ["full-8", "searched"]
    assert torch.equal(found["searched"], pictures[:16].expand(-1, 3, -1, -1))
    unlike = runs.assign(labels=["balanced" if family == "full" else "random" for family in runs["family"]])
    assert len(strips.shared(folder, unlike)) == 1  # other classes: not the same pictures
    write_report(folder, folder)
    assert "](side-by-side.png)" in (folder / "report.md").read_text()
    assert verify(folder) == []


def test_a_report_of_one_run_lies_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame(ms=5.0, fd=12.0).to_csv(tmp_path / "runs.csv", index=False)
    results.report((tmp_path,))
    assert (tmp_path / "report.html").exists()
    results.report((tmp_path / "runs.csv",))
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    with pytest.raises(InputError, match="--out: missing; expected a folder for the report of 2 runs"):
        results.report((tmp_path, tmp_path))
    with pytest.raises(InputError, match="folders of runs, or --verify"):
        results.report()


@pytest.mark.parametrize("run", ["cifar10", "peers"])
def test_the_terminal_shows_every_saving_with_its_verdict_in_80_columns(run: str) -> None:
    text = on_terminal(RESULTS / run)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    saved = [line for line in text.splitlines() if re.search(r"\d% +(≥ \d+%|-?\d+ ± \d+%|–) +\S", line)]
    assert len(saved) > 20
    assert all(re.search(r"(yes|no|not shown|no verdict) *$", line) for line in saved)


def test_verdict_blocks_of_the_documents_draw_several_seeds() -> None:
    """A block that evaluates into a run and reports it draws three seeds at least."""
    judging = [
        (page, fence.code)
        for page in pages()
        for fence in fences(page, "sh", "bash")
        if "dyndit evaluate" in fence.code and "dyndit report" in fence.code
    ]
    assert len(judging) >= 2
    for page, code in judging:
        seeds = re.search(r"for seed in ([\d ]+);", code)
        assert seeds is not None, page
        assert len(seeds[1].split()) >= 3, page


def test_new_columns_are_written_and_read(tmp_path: Path) -> None:
    row = frame(ms=5.0, fd=12.0).iloc[-1].to_dict() | {"macs": 10.0, "macs_heads": 3.0, "calibration": "2"}
    append_run(tmp_path / "runs.csv", row)
    found = read_runs(tmp_path).iloc[0]
    assert (found["macs_heads"], found["calibration"]) == (3.0, "2")


def test_labels_of_the_axes_do_not_overlap() -> None:
    """Ten bands of timesteps, as in every run: the boxes of the labels lie apart."""
    columns = [f"{900 - 100 * k}–{999 - 100 * k}" for k in range(10)]
    figure = error_figure(pd.DataFrame(torch.rand(11, 10).numpy() + 0.1, index=range(1, 12), columns=columns))
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert [text.get_text() for text in labels] == columns
    ends = [text.get_window_extent().x1 for text in labels]
    starts = [text.get_window_extent(figure.canvas.get_renderer()).x0 for text in labels]
    turned = labels[0].get_rotation() == 45  # parallel lines of text: a line's height apart is enough
    height = labels[0].get_fontsize() * figure.dpi / 72
    apart = [b - a for a, b in itertools.pairwise(ends if turned else starts)]
    assert min(apart) > (1.4 * height if turned else max(e - s for s, e in zip(starts, ends, strict=True)))
    few = error_figure(pd.DataFrame([[0.1, 0.2]], index=[1], columns=["500–999", "0–499"]))
    assert few.axes[0].get_xticklabels()[0].get_rotation() == 0


def test_labels_of_steps_do_not_overlap() -> None:
    figure = frontier_figure(read_runs(RESULTS / "digits"))
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.texts if not text.get_text().startswith("↑")]
        assert len(boxes) > 8
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("run", ["cifar10", "peers", "digits"])
def test_tables_have_no_column_and_no_row_of_dashes(run: str) -> None:
    runs = read_runs(RESULTS / run)
    rows = runs[runs["extractor"] == runs["extractor"].iloc[0]]
    for table in tables_of(summary(rows), rows):
        for title, column in zip(table.columns, zip(*table.rows, strict=True), strict=True):
            assert any(cell.text not in ("", "–") for cell in column), (table.name, title)
        if table.name != "arms":  # full depth is compared with nothing
            for row in table.rows:
                assert sum(cell.text == "–" for cell in row) < len(row) / 2 or table.name == "winners", table.name


def test_nothing_is_told_twice(tmp_path: Path) -> None:
    """Equal plans share a row of the map and a sentence; a figure of the run gives way to the report's; one table."""
    plan = DepthPlan((999, 749, 499, 249), steps("3", "6|3", "12|6", "12|12"), 12, "ddim", cfg_scale=1.5)
    first = frame(ms=5.0, fd=12.0, plan="plan.json", arm="searched-ddim-8-b0.5")
    second = frame(ms=5.0, fd=12.0, plan="plan-2.json", arm="searched-ddim-8-b0.6")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("plan.json", "plan-2.json"):
        plan.save(folder / name)
    save(plan_figure({"searched": plan}), folder / "plan.png")
    written(folder, pd.concat([first, second[second["family"] == "searched"]], ignore_index=True))
    text = (folder / "report.md").read_text()
    assert "The same plan: searched-ddim-8-b0.5, searched-ddim-8-b0.6." in text
    assert "<!-- searched-ddim-8-b0.5 = b0.6 -->" in (folder / "plan-map.svg").read_text(encoding="utf-8")
    assert "](plan-map.png)" in text
    assert "](plan.png)" not in text
    assert len(re.findall(r"time saved at equal FD", text)) == 1
    budgets = re.findall(r"^\| ([\d.]+) \| \w+ \|", text, re.M)
    assert budgets == ["4", "5", "8"], "a budget without news has no row of its own"
