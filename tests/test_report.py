"""Report: numbers only from the frame, one self-contained file, nothing averaged across machines."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from test_frontier import frame

from dyndit.analysis.figures import (
    error_figure,
    frontier_figure,
    plan_figure,
    predicted_figure,
    samples_figure,
    save,
)
from dyndit.analysis.frontier import summary
from dyndit.analysis.report import (
    control_findings,
    frontier_findings,
    headlines,
    markdown_table,
    plan_findings,
    terminal_table,
    write_report,
)
from dyndit.errors import InputError

PLAN = {"timesteps": [999, 749, 499, 249], "cond": [3, 6, 12, 12], "uncond": [0, 3, 6, 12], "num_blocks": 12}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    frame(ms=5.0, fd=12.1, noise=0.05, predicted_fd=11.0).to_csv(folder / "runs.csv", index=False)
    manifest = {"seed": 3, "versions": {"torch": "2.15"}, "note": "<b>|</b>"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    save(plan_figure({"searched": PLAN}), folder / "plan.png")
    return folder


class Checker(HTMLParser):
    """Checks that tags close in order, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_whole_and_needs_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    page = write_report(run_dir, tmp_path / "out", title="A <title>").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.links) == 2  # frontier and plan
    assert all(link.startswith("data:image/png;base64,") for link in checker.links)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "A <title>" in checker.text
    assert "<b>|</b>" in checker.text  # escaped in the source
    assert "<b>" not in page


def test_markdown_links_figures_that_exist(run_dir: Path, tmp_path: Path) -> None:
    write_report(run_dir, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["frontier.png", "../run/plan.png"]
    assert all((tmp_path / "out" / link).is_file() for link in links)
    assert "versions.torch | 2.15" in text
    assert not list((tmp_path / "out").glob("*partial*"))


def test_every_number_of_a_row_is_the_summary_s(run_dir: Path) -> None:
    table = summary(pd.read_csv(run_dir / "runs.csv"))
    row = table[table["arm"] == "searched"].iloc[0]
    line = next(line for line in markdown_table(table).splitlines() if line.startswith("| searched"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["searched", "ddim", "8", "50%", "5.00"]
    assert cells[5] == str(row["fd"])
    assert cells[6] == f"{row['time_saved']:.0%}"
    saved = row["time_saved_equal_fd"]
    assert cells[7] == f"{100 * saved.mean:.0f} ± {100 * saved.half:.0f}%"
    assert cells[8] == f"{row['fd_diff']:+.2f}"
    assert cells[9] == "yes"


def test_markdown_table_is_rectangular() -> None:
    lines = markdown_table(summary(frame(ms=3.0, fd=12.0))).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "time outside" in lines[-1]


def test_terminal_table_fits_and_has_the_eight_columns() -> None:
    console = Console(width=80, record=True, file=StringIO())
    table = terminal_table(summary(frame(ms=5.0, fd=12.0)))
    console.print(table)
    assert [" ".join(str(c.header).split()) for c in table.columns] == [
        "arm", "solver", "steps", "share of blocks", "ms per picture", "FD ± 95%",
        "saved vs full", "saved at equal FD",
    ]  # fmt: skip
    text = console.export_text()
    assert "searched" in text
    assert "FD is FD-digits" in text
    assert "…" not in text  # nothing cut off


def test_headlines_name_the_best_plan_that_keeps_quality() -> None:
    good, fast_bad = frame(ms=5.0, fd=12.0), frame(ms=4.5, fd=14.0)
    bad = fast_bad[fast_bad["arm"] == "searched"].assign(arm="greedy")
    found = headlines(summary(pd.concat([good, bad])))
    assert "largest time saving at unchanged quality 38%, at 50% of the blocks (searched;" in found[0]
    assert "1 of 2 plans keep it" in found[0]
    alone = headlines(summary(frame(ms=5.0, fd=14.0)))
    assert alone[0] == "ddim, 8 steps: none of 1 plans keeps full depth's quality."


def with_controls() -> pd.DataFrame:
    """The frame, with budget 0.5: a searched plan of FD 12, a ramp a little better, a far worse one, a reversal."""
    runs = frame(ms=5.0, fd=12.0, noise=0.05, budget=0.5, plan="plan.json")
    mine = runs[runs["arm"] == "searched"]
    jitter = [0.01, -0.01, 0.0, 0.02, -0.02]
    others = [
        mine.assign(arm=arm, family=family, fd=mine["fd"].to_numpy() + shift + jitter, plan="")
        for arm, family, shift in (("ramp-1", "ramp", -0.5), ("ramp-2", "ramp", 9), ("reversed", "reversed", 5))
    ]
    return pd.concat([runs, *others])


def test_controls_are_compared_at_their_budget() -> None:
    found = control_findings(with_controls())
    assert len(found) == 2
    assert "the best of 2 ramp plans, ramp-1: FD +0.50" in found[0]
    assert "(worse)" in found[0]
    assert "against reversed: FD -5.00" in found[1].replace("−", "-")
    assert "(better)" in found[1]
    assert control_findings(frame(ms=5.0, fd=12.0)) == []


def test_depth_by_thirds_is_read_from_the_plans(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"cond": [1, 1, 4, 6, 12, 12]}))
    assert "1.0, 5.0, 12.0" in plan_findings(tmp_path, with_controls())[0]
    assert plan_findings(tmp_path / "elsewhere", with_controls()) == []


def test_frontier_findings_count_plans_between_5_and_20_steps() -> None:
    runs = frame(ms=5.0, fd=12.0, noise=0.05)
    steps = sorted(runs.loc[runs["family"] == "full", "steps"].unique())
    renamed = runs.replace({"steps": {steps[0]: 5, steps[-1]: 20}})
    found = frontier_findings(summary(renamed))
    assert "of 1 searched plans 1 lie clearly below" in found[0]
    assert ", 0 above it" in found[0]
    assert frontier_findings(summary(runs)) == []  # full depth was not measured at 5 and 20 steps


def test_machines_get_tables_of_their_own(run_dir: Path, tmp_path: Path) -> None:
    runs = pd.read_csv(run_dir / "runs.csv")
    both = [runs, runs.assign(machine="gpu", ms_per_picture=runs["ms_per_picture"] / 100)]
    pd.concat(both).to_csv(run_dir / "runs.csv", index=False)
    write_report(run_dir, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "m on cpu" in text
    assert "m on gpu" in text
    lines = [line for line in text.splitlines() if line.startswith("| searched")]
    assert [line.split("|")[5].strip() for line in lines] == ["5.00", "0.0500"]
    assert {p.name for p in (tmp_path / "out").glob("frontier*")} == {"frontier-1.png", "frontier-2.png"}


def test_several_runs_make_one_report(run_dir: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    pd.read_csv(run_dir / "runs.csv").assign(run="again").to_csv(second / "runs.csv", index=False)
    text = write_report([run_dir, second], tmp_path / "out").with_suffix(".md").read_text(encoding="utf-8")
    assert text.count("## r: ") == 1
    assert text.count("## again: ") == 1


def test_bad_runs_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        write_report(tmp_path, tmp_path / "out")
    (run_dir / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: unreadable"):
        write_report(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (run_dir / "manifest.json").unlink()
    pd.read_csv(run_dir / "runs.csv").assign(role="search").to_csv(run_dir / "runs.csv", index=False)
    with pytest.raises(InputError, match="no row of role 'score'"):
        write_report(run_dir, tmp_path / "out")


def test_figures_are_drawn_at_readme_width(tmp_path: Path) -> None:
    runs = frame(ms=5.0, fd=12.0, predicted_fd=11.0)
    odd = frame(ms=6.0, fd=60.0, predicted_fd=50.0, arm="rev", family="reversed")
    runs = pd.concat([runs, odd[odd["arm"] == "rev"]])
    both = pd.concat([runs, runs.assign(solver="unipc", arm=runs["arm"] + "-unipc")])
    rows = {"full": torch.zeros(20, 1, 8, 8, dtype=torch.uint8), "searched": torch.zeros(20, 3, 8, 8).byte()}
    errors = pd.DataFrame([[0.1, 0.0], [0.01, 0.2]], index=[1, 2], columns=[-4.0, 4.0])
    figures = {
        "frontier": frontier_figure(runs),
        "solvers": frontier_figure(both),
        "plan": plan_figure({"a": PLAN, "b": PLAN | {"uncond": [0] * 4}}),
        "samples": samples_figure(rows),
        "predicted": predicted_figure(runs),
        "errors": error_figure(errors),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert 600 <= image.width <= 1500
            assert len(image.convert("L").getcolors()) > 3  # something was drawn
    assert len(figures["solvers"].axes) == 2
    assert len(list(tmp_path.iterdir())) == len(figures)
