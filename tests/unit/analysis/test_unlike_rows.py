"""Rows say how their pictures were drawn, resized and compared; unlike rows are refused or warned of."""

import json
from pathlib import Path

import numpy as np
import pytest

from dyndit.analysis.report.findings import origin_findings
from dyndit.analysis.report.runs import RUNS, UNTOLD, append_run, check_addable, read_runs, row_of_samples
from dyndit.analysis.report.write import write_report
from dyndit.cli import main
from dyndit.errors import InputError
from dyndit.sampling.sample import random_labels, sample_into
from dyndit.sampling.solvers import kind_of
from dyndit.seals import sealed
from support.pictures import noise, save
from support.runs import frame, run_row

FIGURES = {"extractor": "inception", "fd": 3.0, "metric": "FID", "resize": "adm 256", "reference": "statistics of ADM"}


def drawn(root: Path, labels: object, solver: str = "ddpm", seed: int = 0, num: int = 90, size: int = 8) -> Path:
    for i in range(num):
        save(root / f"{i:06d}-class0.png", noise(size, size, seed=seed * num + i))
    settings = {"model": "m", "solver": solver, "steps": 4, "cfg_scale": 1.5, "seed": seed, "num_images": num}
    settings |= {"dtype": "bfloat16"} | ({} if labels is None else {"labels": labels})
    plan = {"router": "full", "settings": "", "budget": None, "share_of_blocks": 1, "mean_depth": [6, 6]}
    facts = {"machine": "here", "ms_per_picture": 1.0, "ms_denoiser": None}
    manifest = {"settings": settings, "plan": plan | {"predicted_fd": None}, **facts}
    (root / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return root


@pytest.mark.parametrize(
    ("labels", "said"), [("in turn", "balanced"), ("random", "random"), ([207, 360], "207 360"), (None, "")]
)
def test_a_row_says_how_its_pictures_were_made(tmp_path: Path, labels: object, said: str) -> None:
    row = row_of_samples(drawn(tmp_path, labels, num=1), FIGURES, "r")
    told = {name: row[name] for name in ("labels", "noise", "resize", "reference", "dtype", "cfg_scale", "num_images")}
    assert told == {
        "labels": said, "noise": "SDE", "resize": "adm 256", "reference": "statistics of ADM", "dtype": "bfloat16",
        "cfg_scale": 1.5, "num_images": 1,
    }  # fmt: skip
    append_run(tmp_path / RUNS, row)
    assert read_runs(tmp_path)["labels"].fillna("")[0] == said


def test_solvers_of_odes_and_of_sdes() -> None:
    kinds = {name: kind_of(name) for name in ("ddpm", "ddim", "dpmpp", "unipc", "euler", "flow-euler", "another")}
    assert kinds.pop("ddpm") == "SDE"
    assert kinds.pop("another") == ""
    assert set(kinds.values()) == {"ODE"}


@pytest.mark.parametrize("column", ["resize", "reference"])
def test_rows_that_differ_in_resize_or_reference_are_refused(tmp_path: Path, column: str) -> None:
    append_run(tmp_path / RUNS, run_row(**{column: "one"}), run_row(arm="other", **{column: "two"}))
    with pytest.raises(InputError, match=rf"{column} is 'one' of arm full-10 and 'two' of arm other") as caught:
        read_runs(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="do not compare"):
        write_report(tmp_path, tmp_path / "report")
    apart = tmp_path / "apart"
    append_run(apart / RUNS, run_row(**{column: "one"}), run_row(extractor="other", **{column: "two"}))
    assert len(read_runs(apart)) == 2  # figures of other extractors are apart anyway


def test_a_file_without_these_columns_tells_nothing_of_them(tmp_path: Path) -> None:
    frame(ms=5.0, fd=12.0).drop(columns=list(UNTOLD)).to_csv(tmp_path / RUNS, index=False)
    runs = read_runs(tmp_path)
    untold = runs[list(UNTOLD)]
    assert ((untold == "") | untold.isna()).all(axis=None)
    assert origin_findings(runs) == []


def test_unlike_class_labels_and_references_of_statistics_stand_in_the_report(tmp_path: Path) -> None:
    runs = frame(ms=5.0, fd=12.0).assign(reference="statistics of ADM; extractor unknown", resize="adm 256")
    runs["labels"] = np.where(runs["arm"] == "searched", "random", "balanced")
    runs.to_csv(tmp_path / RUNS, index=False)
    page = (write_report(tmp_path, tmp_path / "report").parent / "report.md").read_text()
    assert "Warning: arms differ in their class labels (balanced, random)" in page
    assert "Reference: statistics of ADM; extractor unknown." in page
    assert "cropped and resized: adm 256." in page


def test_a_second_row_of_the_same_pictures_is_refused_and_unlike_labels_are_warned_of(tmp_path: Path) -> None:
    assert check_addable(tmp_path / RUNS, run_row()) == []
    append_run(tmp_path / RUNS, run_row(labels="balanced"))
    with pytest.raises(InputError, match="holds arm full-10, block 0 already"):
        check_addable(tmp_path / RUNS, run_row(labels="balanced"))
    (warning,) = check_addable(tmp_path / RUNS, run_row(arm="b", labels="random"))
    assert warning.startswith("class labels random beside balanced")
    with pytest.raises(InputError, match="resize is"):
        check_addable(tmp_path / RUNS, run_row(arm="b", resize="adm 256"))


def test_evaluate_writes_warns_and_refuses(tmp_path: Path, capsys) -> None:
    common = ["--reference", "digits", "--extractor", "digits", "--metrics", "fd", "--out", str(tmp_path / "run")]
    first, second = drawn(tmp_path / "a", "in turn", "ddim"), drawn(tmp_path / "b", "random", "ddpm", seed=1)
    main(["evaluate", str(first), *common])
    capsys.readouterr()
    before = (tmp_path / "run" / RUNS).read_bytes()
    main(["evaluate", str(first), *common])  # the same set again: the row that is there
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(second), *common, "--resize-and-crop", "8", "--force"])
    assert stop.value.code == 2
    assert "resize" in capsys.readouterr().err
    assert (tmp_path / "run" / RUNS).read_bytes() == before
    main(["evaluate", str(second), *common])
    assert "warning: class labels random beside balanced" in capsys.readouterr().err
    rows = read_runs(tmp_path / "run")
    assert list(rows["noise"]) == ["ODE", "SDE"]


def test_mixed_sizes_damage_and_statistics_on_the_command_line(tmp_path: Path, capsys) -> None:
    samples = tmp_path / "mixed"
    for i in range(80):
        save(samples / f"{i:03d}.png", noise(8 + i % 3, 8, seed=i))
    (samples / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    common = ["evaluate", str(samples), "--reference", "digits", "--extractor", "digits", "--metrics", "fd"]
    for more, message in (([], "0.png: unreadable"), (["--skip-damaged"], "--resize-and-crop SIZE")):
        with pytest.raises(SystemExit):
            main([*common, *more])
        assert message in capsys.readouterr().err
    kept = ["--skip-damaged", "--resize-and-crop", "8", "--save-reference", str(tmp_path / "ref.npz"), "--json"]
    main([*common, *kept])
    found = capsys.readouterr()
    figures = json.loads(found.out.splitlines()[-1])
    assert (figures["num_samples"], figures["resize"]) == (80, "adm 8")
    assert "skipped 1 damaged pictures" in found.err
    assert f"{samples}/0.png" in found.err
    np.savez(tmp_path / "any.npz", mu=np.zeros(64), sigma=np.eye(64))
    stated = [*common[:2], "--reference", str(tmp_path / "any.npz"), *common[4:], *kept[:3]]
    with pytest.raises(SystemExit):
        main(stated)
    assert "expected those of digits" in capsys.readouterr().err
    main([*stated, "--reference-extractor", "digits", "--reference-count", "500", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "extractor digits; pictures 500; resize unknown; source unknown" in figures["reference"]


def test_random_labels_are_a_function_of_seed_and_number(model, tmp_path: Path) -> None:
    first = random_labels(model, 200, seed=3)
    assert random_labels(model, 50, seed=3) == first[:50]
    assert random_labels(model, 200, seed=4) != first
    assert set(first) == set(range(model.backbone.condition.num_classes))
    options = {"num_steps": 1, "batch_size": 4}
    stored = sample_into(tmp_path / "a", model, "random", 6, seed=3, **options)
    assert stored.manifest["settings"]["labels"] == "random"
    names = sorted(path.name for path in (tmp_path / "a").glob("*-class*.png"))
    assert names == [f"{i:06d}-class{label}.png" for i, label in enumerate(first[:6])]
    with pytest.raises(InputError, match="another run"):
        sample_into(tmp_path / "a", model, None, 6, seed=3, **options)


@pytest.mark.parametrize(("given", "expected"), [(("balanced",), None), (("random",), "random"), (("3", "7"), (3, 7))])
def test_class_labels_of_the_command_line(given: tuple[str, ...], expected: object) -> None:
    from dyndit.cli.pictures import _classes

    assert _classes(given) == expected
    with pytest.raises(InputError, match="--class-labels cat"):
        _classes(("3", "cat"))


def test_training_says_what_it_skips_and_refuses_damage_before_it_writes(tmp_path: Path, capsys) -> None:
    for i in range(6):
        save(tmp_path / "set" / f"class{i % 2}" / f"{i}.png", noise(8, 8, seed=i))
    save(tmp_path / "set" / "loose.png", noise(8, 8))
    (tmp_path / "set" / "class0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dyndit.models.dit import DiTConfig\n"
        "from dyndit.training.config import FitConfig\n"
        "from dyndit.training.train import Train\n"
        "config = DiTConfig(8, 2, 1, width=16, num_blocks=1, num_heads=2, num_classes=2)\n"
        "train = Train(config, FitConfig(steps=1, batch_size=2))\n"
    )
    common = ["train", str(recipe), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(common)
    assert stop.value.code == 2
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main([*common, "--skip-damaged"])
    found = capsys.readouterr().err
    assert "skipped 1 pictures beside class folders (loose.png)" in found
    assert "skipped 1 damaged pictures" in found
    account = json.loads((tmp_path / "out" / "manifest.json").read_text())["pictures"]
    assert account["pictures"] == 6
    assert {reason: entry["number"] for reason, entry in account["skipped"].items()} == {
        "pictures beside class folders": 1,
        "damaged pictures": 1,
    }
    save(tmp_path / "set" / "class0" / "broken.png", noise(8, 8, seed=9))
    with pytest.raises(SystemExit):
        main(common)
    assert "holds another run (data " in capsys.readouterr().err
