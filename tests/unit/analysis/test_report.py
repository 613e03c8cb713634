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

from dyndit import sealed_csv
from dyndit.analysis.report.figures import (
    error_figure,
    frontier_figure,
    predicted_figure,
    samples_figure,
    spread_figure,
    time_figure,
)
from dyndit.analysis.report.findings import (
    budget_findings,
    control_findings,
    frontier_findings,
    headlines,
    plan_findings,
)
from dyndit.analysis.report.frontier import summary
from dyndit.analysis.report.plan_figures import plan_figure, plan_map_figure
from dyndit.analysis.report.style import save
from dyndit.analysis.report.tables import markdown_table, tables_of, terminal_table
from dyndit.analysis.report.verify import verify
from dyndit.analysis.report.write import write_report
from dyndit.cli import results
from dyndit.errors import InputError
from dyndit.files import sha256
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step, steps
from support.runs import frame

PLAN = DepthPlan((999, 749, 499, 249), steps("3", "6|3", "12|6", "12|12"), 12, "ddim", cfg_scale=1.5)
UNGUIDED = PLAN.with_steps([Step(step.depth) for step in PLAN.steps])


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
        if tag not in ("meta", "img", "br", "link"):
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
    assert checker.links[0] == "data:,"  # no favicon is asked for
    assert len(checker.links) == 5  # and frontier, time, spread, plan
    assert all(link.startswith("data:image/png;base64,") for link in checker.links[1:])
    assert not re.search(r"https?://|@import|url\(", page)
    assert "A <title>" in checker.text
    assert "<b>|</b>" in checker.text  # escaped in the source
    assert "<b>" not in page


def test_markdown_links_figures_that_exist(run_dir: Path, tmp_path: Path) -> None:
    write_report(run_dir, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["frontier.png", "time.png", "spread.png", "../run/plan.png"]
    assert all((tmp_path / "out" / link).is_file() for link in links)
    assert "versions.torch | 2.15" in text
    assert not list((tmp_path / "out").glob(".*"))


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
        "arm", "solver steps", "share of blocks", "ms per picture", "FD ± 95%",
        "saved vs full", "saved at equal FD", "quality un- changed",
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
    assert alone[0] == "ddim, 8 steps: none of 1 plans is shown to keep full depth's quality."


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


def test_variants_stand_in_a_table_and_not_in_sentences() -> None:
    runs = with_controls()
    variants = runs[runs["family"] == "reversed"].assign(
        arm="searched-wide-b0.5", family="searched-wide", variant="wide", ms_per_picture=10.0
    )
    runs = pd.concat([runs, variants])
    assert not any("wide" in found for found in control_findings(runs))
    table = next(table for table in tables_of(summary(runs), runs) if table.name == "against the searched plan")
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert list(cells) == ["ramp-1", "ramp-2", "reversed", "searched-wide-b0.5"]
    assert [of[-2] for of in cells.values()] == ["better", "worse", "worse", "worse"]
    assert cells["searched-wide-b0.5"] == ["ddim", "8", "0.5", "+5.00 ± 0.02", "worse", "2.00"]
    assert [round(v, 2) for v in table.rows[3][4].values] == [5.0, 4.98, 5.02]


def test_depth_by_thirds_is_read_from_the_plans(tmp_path: Path) -> None:
    plan = DepthPlan((6, 5, 4, 3, 2, 1), steps("1", "1", "4", "6", "12", "12"), 12, "ddim")
    plan.save(tmp_path / "plan.json")
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
    alone = renamed[renamed["family"] == "full"].assign(solver="dpmpp")  # a solver that no plan was searched for
    assert frontier_findings(summary(pd.concat([renamed, alone.assign(arm="dpmpp-" + alone["arm"])]))) == found


def test_machines_get_tables_of_their_own(run_dir: Path, tmp_path: Path) -> None:
    runs = pd.read_csv(run_dir / "runs.csv")
    both = [runs, runs.assign(machine="gpu", ms_per_picture=runs["ms_per_picture"] / 100)]
    pd.concat(both).to_csv(run_dir / "runs.csv", index=False)
    write_report(run_dir, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "m on cpu" in text
    assert "m on gpu" in text
    lines = [line for line in text.splitlines() if line.startswith("| searched | ddim | 8 |")]
    assert [line.split("|")[5].strip() for line in lines] == ["5.00", "0.0500"]
    assert {p.name for p in (tmp_path / "out").glob("frontier*.png")} == {"frontier-1.png", "frontier-2.png"}
    assert "| r | cpu |" in text
    assert "| r | gpu |" in text


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
    with pytest.raises(InputError, match=r"manifest\.json: not JSON"):
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
        "plan": plan_figure({"a": PLAN, "b": UNGUIDED}),
        "samples": samples_figure(rows),
        "predicted": predicted_figure(runs),
        "errors": error_figure(errors),
        "plan-map": plan_map_figure({"a": PLAN, "b": UNGUIDED, "c": PLAN}),
        "time": time_figure(runs),
        "spread": spread_figure(runs),
    }
    for name, figure in figures.items():
        save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert 600 <= image.width <= 1500
            assert len(image.convert("L").getcolors()) > 3  # something was drawn
    assert len(figures["solvers"].axes) == 2
    assert len(list(tmp_path.iterdir())) == len(figures)


FAMILIES = ("stale", "forecast", "first-block-cache", "taylorseer", "pruned", "switch", "random")


def with_peers() -> pd.DataFrame:
    """The frame, and a peer of each family that nobody foresaw; `stale` beats the searched plan in the same time."""
    runs = frame(ms=5.0, fd=12.0, noise=0.05)
    mine = runs[runs["arm"] == "searched"]
    jitter = [0.01, -0.01, 0.0, 0.02, -0.02]
    changes = {"plan": "", "share_of_blocks": float("nan"), "budget": float("nan")}
    peers = [
        mine.assign(arm=f"{family}-1", family=family, fd=mine["fd"].to_numpy() + shift + jitter, **changes)
        for family, shift in zip(FAMILIES, (-2, 0.5, 1, 1.5, 2, 2.5, 6), strict=True)
    ]
    return pd.concat([runs, *peers], ignore_index=True)


@pytest.fixture
def peers_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "peers"
    folder.mkdir()
    with_peers().to_csv(folder / "runs.csv", index=False)
    return folder


def test_families_of_any_name_get_their_place(peers_dir: Path, tmp_path: Path) -> None:
    text = write_report(peers_dir, tmp_path / "out").with_suffix(".md").read_text(encoding="utf-8")
    header = next(line for line in text.splitlines() if line.startswith("| budget, ms"))
    assert all(f"| {family} |" in header for family in FAMILIES)
    assert re.search(r"against full depth at equal time, how many .*; taylorseer \d and \d of 1", text)
    labels = [entry.get_text() for entry in frontier_figure(with_peers()).legends[0].get_texts()]
    assert set(FAMILIES) | {"searched"} <= set(labels)
    handles = frontier_figure(with_peers()).legends[0].legend_handles
    looks = {(handle.get_color(), handle.get_marker()) for handle in handles}
    assert len(looks) == len(handles)  # no two families look alike


def test_findings_name_the_families_that_beat_searched_plans() -> None:
    found = budget_findings(with_peers())
    assert found[1].startswith("Families that beat searched plans at equal time: stale (within 5, 6, 7, 8")
    assert "forecast" not in found[1]
    assert "no searched plan is as fast as 4 ms" in found[1]
    lost = with_peers()
    none = budget_findings(lost[lost["family"] != "stale"])
    assert "Families that beat searched plans at equal time: none" in none[1]
    assert "searched at" in none[0]


def test_every_figure_has_its_manifest_and_both_formats(run_dir: Path, tmp_path: Path) -> None:
    write_report(run_dir, tmp_path / "out")
    for name in ("frontier", "time", "spread"):
        facts = json.loads((tmp_path / "out" / f"{name}.manifest.json").read_text())
        assert set(facts["files"]) == {f"{name}.png", f"{name}.svg"}
        assert all(sha256(tmp_path / "out" / file) == known for file, known in facts["files"].items())
        assert (tmp_path / "out" / facts["runs"]).resolve() == (run_dir / "runs.csv").resolve()
        assert facts["sha256 of the runs"] == sha256(run_dir / "runs.csv")
        assert facts["lines of the runs file"] == list(range(2, 22))
        assert facts["versions"]["torch"]
        assert "command" in facts
    assert "plan.png" in (tmp_path / "out" / "plan.manifest.json").read_text()


def test_exit_errors_are_drawn_layer_over_timestep(run_dir: Path, tmp_path: Path) -> None:
    rows = [{"depth": d, "band": b, "noise_error": 0.1 * d + b} for d in (1, 2) for b in (0, 1)]
    pd.DataFrame(rows).to_csv(run_dir / "exit-errors.csv", index=False)
    write_report(run_dir, tmp_path / "out")
    assert "<!-- 500–999 -->" in (tmp_path / "out" / "exit-errors.svg").read_text(encoding="utf-8")
    manifest = tmp_path / "out" / "exit-errors.manifest.json"
    assert json.loads(manifest.read_text())["exit errors"]["checksum"] == "none: not checked"
    sealed_csv.write(run_dir / "exit-errors.csv", pd.DataFrame(rows))
    write_report(run_dir, tmp_path / "out")
    assert json.loads(manifest.read_text())["exit errors"]["checksum"] == "fits"
    assert verify(tmp_path / "out") == []
    rows[0]["noise_error"] = 0.3
    sealed_csv.write(run_dir / "exit-errors.csv", pd.DataFrame(rows))
    assert "not the errors that exit-errors.manifest.json describes" in verify(tmp_path / "out")[0]
    (run_dir / "exit-errors.csv").write_text((run_dir / "exit-errors.csv").read_text().replace("0.3", "0.4"))
    with pytest.raises(InputError, match="damaged or edited"):
        write_report(run_dir, tmp_path / "out")


@pytest.mark.parametrize("folder", ["run_dir", "peers_dir"])
def test_a_report_left_alone_verifies(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_report([request.getfixturevalue(folder)], tmp_path / "out", margin=0.03)
    assert verify(tmp_path / "out") == []
    assert verify(tmp_path / "out" / "report.md") == []


TAMPERED = [
    ("report.md", "| 50% | 5.00 |", "| 50% | 4.00 |", "report.md, searched, ms per picture: '4.00', recomputed '5.00'"),
    ("report.html", ">5.00<", ">4.00<", "report.html, "),
    ("report.json", '"text": "5.00"', '"text": "4.00"', "report.json, "),
    ("report.json", "5.0\n", "5.01\n", "[5.01], recomputed [5.0]"),
    ("report.md", "unchanged quality 38%", "unchanged quality 83%", "report.md, finding: "),
    ("report.md", "5 seed blocks", "9 seed blocks", "report.md: section "),
]


@pytest.mark.parametrize(("file", "old", "new", "line"), TAMPERED)
def test_a_tampered_number_is_found(run_dir: Path, tmp_path: Path, file: str, old: str, new: str, line: str) -> None:
    write_report(run_dir, tmp_path / "out")
    text = (tmp_path / "out" / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "out" / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    found = verify(tmp_path / "out")
    assert len(found) == 1
    assert line in found[0]
    assert "\n" not in found[0]


def test_changed_rows_and_figures_are_found(run_dir: Path, tmp_path: Path) -> None:
    write_report(run_dir, tmp_path / "out")
    runs = pd.read_csv(run_dir / "runs.csv")
    runs.loc[runs["arm"] == "searched", "ms_per_picture"] = 4.5
    runs.to_csv(run_dir / "runs.csv", index=False)
    (tmp_path / "out" / "time.png").write_bytes(b"another")
    found = verify(tmp_path / "out")
    assert "SHA-256 differs" in found[0]
    assert any("report.md, searched, ms per picture: '5.00', recomputed '4.50'" in line for line in found)
    assert "time.png: not the figure" in found[-1]


def test_the_verb_verifies_with_an_exit_status(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    results.report((run_dir,), out=out)
    results.report(verify=out)
    assert "every number follows" in capsys.readouterr().out
    text = (out / "report.md").read_text(encoding="utf-8")
    (out / "report.md").write_text(text.replace("| 50% | 5.00 |", "| 50% | 5.50 |"), encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        results.report(verify=out)
    assert caught.value.code == 1
    assert capsys.readouterr().out.splitlines() == ["report.md, searched, ms per picture: '5.50', recomputed '5.00'"]


def test_what_is_no_report_is_refused_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json: no such file"):
        verify(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InputError, match="lacks 'sources'"):
        verify(tmp_path)
    with pytest.raises(InputError, match="folders of runs, or --verify"):
        results.report(())


def test_published_runs_without_optional_figures_make_a_report(tmp_path: Path) -> None:
    digits = Path(__file__).parents[3] / "docs" / "results" / "digits"
    write_report(digits, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert (tmp_path / "out" / "plan-map.svg").is_file()
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Families that beat searched plans at equal time: " in text


PUBLISHED = [
    "peers",
    "cifar10",
    "cifar10-levers",
    "levers",
    "calibration",
    "ablation",
    "ablation-training",
    "distillation",
    "tables",
    "cifar10-ablation",
    "cifar10-rivals",
    "claim",
    "claim-tries",
]


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_results_follow_from_their_rows(run: str) -> None:
    """What the README quotes: every number recomputed, every figure the one that its manifest describes."""
    assert verify(Path(__file__).resolve().parents[3] / "docs" / "results" / run) == []
