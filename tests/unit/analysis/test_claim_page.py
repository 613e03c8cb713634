"""Publishing a claim: what is copied, what is made anew, and the README's table."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from dyndit import sealed_csv, seals
from dyndit.analysis.report.claims import Claim, claims_of
from dyndit.analysis.report.runs import append_run
from dyndit.files import read_json, write_json
from support.claims import claim_of, rows_of
from support.fences import ROOT

COSTS = pd.DataFrame({"name": ["exits", "table", "plan"], "seconds": [300.0, 180.0, 60.0], "parameters": [2e6, "", ""]})


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claim_page", ROOT / "docs/scripts/claim.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_of(page: ModuleType, claim: Claim) -> tuple[str, dict[str, list[str]]]:
    """The table's text, and its cells by the first of each row."""
    text = page.table(claim, COSTS.assign(parameters=pd.to_numeric(COSTS["parameters"])))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return text, {first: rest for first, *rest in rows}


def test_the_table_has_every_goal_and_the_nearest_rivals_with_their_losses(page) -> None:
    text, rows = table_of(
        page, claim_of({"D": {"fd": 10.0}, "C-interval": {"fd": 10.3, "ms": 50.0}, "H": {"fd": 10.2}})
    )
    assert [name.split()[0] for name in list(rows)[2:]] == ["1", "2", "3", "less", "less", "less", "4"]
    rivals = {name.split()[1]: (name, cells) for name, cells in rows.items() if name.startswith("less")}
    assert list(rivals) == ["D,", "H,", "C',"], "the strongest first"
    assert rivals["D,"][0].endswith("(time × 1.00)")
    assert rivals["C',"][0].endswith("(time × 1.11)")
    assert all("**" not in cell and "+0." in cell for cell in rivals["D,"][1]), "the plan loses, and the cell says so"
    assert "**" in rows["1 less full depth, upper limit ≤ 3%"][0], "at 1% higher FD, quality is unchanged"
    assert rows["2 time saved, batches of 50 and batches of 1, lower limit ≥ 40%"][0].count("**55") == 2
    assert rows["3 rivals at equal time, better than each"][0] == "8 of 9", "a goal that is missed is not bold"
    assert rows["4 precision less full depth's, lower limit ≥ -0.01"][0].startswith("**")
    assert "9 minutes" in text
    assert "not shown to be better at equal time than D (below)." in text


def test_what_is_missed_is_not_bold(page) -> None:
    fall = {"precision": lambda k: 0.65 + 0.001 * k}
    _, rows = table_of(page, claim_of({"searched": {"fd": 11.6, "ms": 80.0} | fall}))
    assert not [cell for name, cells in rows.items() if not name.startswith("less") for cell in cells if "**" in cell]


def part(folder: Path, *, finished: bool = True) -> Path:
    """A part as a run leaves it, with folders of its machine in the manifest."""
    inputs = {"data": "/home/me/pictures", "extractor_weights": "/home/me/resnet20-cifar10.safetensors"}
    facts = {
        "settings": {"inputs": inputs},
        "command": "claim.py --data /home/me/pictures",
        "list": ["/home/me/pictures"],
    }
    append_run(folder / "runs.csv", *rows_of(0))
    write_json(folder / "manifest.json", seals.sealed(facts))
    sealed_csv.write(folder / "tuning.csv", pd.DataFrame({"family": ["B", "B"], "fd": ["", "7.5"]}))
    for stage, row in zip((folder.parent / "scale", folder.parent / "plan"), ("exits", "table"), strict=True):
        stage.mkdir(exist_ok=True)
        sealed_csv.write(stage / "trainings.csv", COSTS[COSTS["name"] == row])
    (folder / "plan-unipc-20-b0.45.json").write_text("{}")
    (folder / "variants" / "E2").mkdir(parents=True)
    (folder / "variants" / "E2" / "plan-unipc-20-b0.45.json").write_text("{}")
    if finished:
        (folder / "report.json").write_text("{}")
    return folder


def test_a_part_is_published_without_the_machines_folders(page, tmp_path: Path) -> None:
    source = part(tmp_path / "runs" / "0" / "plans-0")
    part(tmp_path / "runs" / "1" / "plans-1", finished=False)
    old = tmp_path / "docs" / "plans-0" / "old.csv"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    page.publish(tmp_path / "runs", tmp_path / "docs")
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["plans-0"], "a part that goes on is not published"
    target = tmp_path / "docs" / "plans-0"
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == {
        *("runs.csv", "manifest.json", "tuning.csv", "trainings.csv"),
        *("plans/plan-unipc-20-b0.45.json", "plans/E2-plan-unipc-20-b0.45.json"),
    }
    assert (target / "runs.csv").read_bytes() == (source / "runs.csv").read_bytes()
    assert "/home" not in "".join(path.read_text() for path in target.rglob("*.json"))
    facts = seals.unsealed(Path("manifest.json"), read_json(target / "manifest.json"))
    assert facts["command"] == "claim.py --data DIR"
    assert facts["settings"]["inputs"]["extractor_weights"] == "resnet20-cifar10.safetensors"
    assert sealed_csv.read(target / "tuning.csv", ("family", "fd"))["fd"].tolist() == [7.5], (
        "without rows over the limit"
    )
    assert sealed_csv.read(target / "trainings.csv", ("name",))["name"].tolist() == ["exits", "table"]
    (claim,) = claims_of([page.read_runs(target)], 0.03)
    assert claim.calibrations == (0,)


def test_the_arms_of_the_results_page_come_by_distance(page) -> None:
    changes = {"D": {"fd": 10.0}, "ecad": None, "L": {"fd": 9.9}}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.arms(claim_of(changes)).splitlines()[2:]]
    assert [row[0][:3] for row in rows[:4]] == ["L: ", "D: ", "A: ", "**G"]
    assert len(rows) == 2 + 9 + 3
    assert rows[-1] == ["I: an evolved cache", "–", *["–", "–"] * 3]
    assert "**" in dict(zip([row[0][:2] for row in rows], rows, strict=True))["B:"][3]
    assert {len(row) for row in rows} == {8}


def test_the_pages_hold_what_the_script_makes_of_the_published_rows(page) -> None:
    for path, text in page.tables(page.claim_in(), page.costs_in()).items():
        found = page.MARKS.search(path.read_text(encoding="utf-8"))
        assert found[0] == text, f"{path.name}: run `python docs/scripts/claim.py`"
