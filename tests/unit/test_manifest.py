"""A folder is claimed by one run, and refuses every other."""

import json
from pathlib import Path

import pytest
import torch

from dyndit import manifest
from dyndit.errors import InputError

SETTINGS = {"verb": "sample", "solver": "ddim", "steps": 20, "labels": (3, 7), "plan": None, "out": Path("x")}


def refused(out: Path, settings: dict) -> str:
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        manifest.claim(out, settings)
    assert before == {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    message = str(caught.value)
    assert "\n" not in message
    assert str(out) in message
    return message


def test_the_same_run_finds_its_manifest(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    assert manifest.claim(out, SETTINGS) is None
    found = manifest.claim(out, dict(reversed(SETTINGS.items())))
    assert found == json.loads((out / "manifest.json").read_text())
    assert found["settings"] == SETTINGS | {"labels": [3, 7], "out": "x"}
    assert found["versions"].keys() >= {"dyndit", "torch", "diffusers", "python"}
    assert {"command", "revision", "machine", "date"} <= found.keys()
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_an_empty_folder_may_be_claimed(tmp_path: Path) -> None:
    assert manifest.claim(tmp_path, SETTINGS) is None
    (tmp_path / "picture.png").touch()
    assert manifest.claim(tmp_path, SETTINGS)["settings"]["steps"] == 20


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 10}, "steps 20, now 10"),
        ({"labels": [3]}, "labels [3, 7], now [3]"),
        ({"solver": "a\nb"}, "solver 'ddim', now"),
        ({"seed": 1}, "seed 'absent', now 1"),
        ({"seed": None}, "seed 'absent', now None"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(changes: dict, named: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    manifest.claim(out, SETTINGS)
    assert named in refused(out, SETTINGS | changes)


def test_of_settings_within_settings_the_one_that_differs_is_named(tmp_path: Path) -> None:
    settings = {"verb": "compare", "experiment": {"fit": {"steps": 5, "seed": 0}, "metrics": ["fd"]}}
    manifest.claim(tmp_path / "run", settings)
    changed = {"verb": "compare", "experiment": {"fit": {"steps": 5, "seed": 1}, "metrics": ["fd"]}}
    assert "(experiment.fit.seed 0, now 1)" in refused(tmp_path / "run", changed)
    changed = {"verb": "compare", "experiment": {"fit": None, "metrics": ["fd"]}}
    assert "(experiment.fit {'steps': 5, 'seed': 0}, now None)" in refused(tmp_path / "run", changed)


def test_a_dropped_setting_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    manifest.claim(out, SETTINGS)
    assert "plan None, now 'absent'" in refused(out, {k: v for k, v in SETTINGS.items() if k != "plan"})


def test_foreign_files_and_folders(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    assert "holds files of no run" in refused(out, SETTINGS)
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(file, SETTINGS)
    assert "cannot be made" in refused(file / "below", SETTINGS)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"settings": null}', '{"settings": [1]}'])
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    assert "expected the manifest of a run" in refused(out, SETTINGS)


def test_variables_that_change_times_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in manifest.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert manifest.describe({})["environment"] == {}
    monkeypatch.setenv("TIMM_FUSED_ATTN", "0")
    assert manifest.describe({})["environment"] == {"TIMM_FUSED_ATTN": "0"}


def test_descriptions_take_facts() -> None:
    found = manifest.describe({"a": 1}, seconds=2.5)
    assert (found["settings"], found["seconds"]) == ({"a": 1}, 2.5)
    assert manifest.machine() in found["machine"]


@pytest.mark.parametrize(("emulated", "told"), [(True, ", AVX2 without bf16, "), (False, ", AVX2, ")])
def test_generations_of_one_model_name_are_two_machines(
    monkeypatch: pytest.MonkeyPatch, emulated: bool, told: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(manifest.runtime, "emulates_bf16", lambda _: emulated)
    assert told in manifest.machine()
