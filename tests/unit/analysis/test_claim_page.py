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


def test_the_table_names_the_nearest_rivals_and_their_losses(page) -> None:
    text, rows = table_of(
        page, claim_of({"D": {"fd": 10.0}, "C-interval": {"fd": 10.3, "ms": 50.0}, "H": {"fd": 10.2}})
    )
    assert [name[0] for name in list(rows)[2:]] == ["f", "D", "H", "C"]
    ratio, *fds, precision = rows["D: the same heads without a search"]
    assert ratio == "1.00"
    assert all("**" not in cell and "+0." in cell for cell in fds), "the plan loses here, and the cell says so"
    assert float(precision) == pytest.approx(0.0, abs=0.01)
    assert rows["C': guidance in an interval"][0] == "1.11"
    assert "**" in rows["full depth, unipc, 20 steps"][1], "at 1% higher FD, quality is unchanged"
    assert "exits 5, table 3, plan 1" in text
    assert "9 minutes" in text


def test_a_change_of_quality_is_not_bold(page) -> None:
    _, rows = table_of(page, claim_of({"searched": {"fd": 10.6}}))
    assert not [cell for cell in rows["full depth, unipc, 20 steps"] if "**" in cell]


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


def test_the_readme_holds_what_the_script_makes_of_the_published_rows(page) -> None:
    if found := page.MARKS.search(page.README.read_text(encoding="utf-8")):
        assert found[0] == page.table(page.claim_in(), page.costs_in()), "run `python docs/scripts/claim.py`"
    else:
        assert len(list(page.FOLDER.glob("*/runs.csv"))) < 10, "ten parts are there: the README has to show them"
