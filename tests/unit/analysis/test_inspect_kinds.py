"""`dyndit inspect` on what evaluation reads: statistics of features, and pictures in folders and archives."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndit.analysis.metrics.sets import Statistics, save_statistics
from dyndit.cli import main
from dyndit.stats import moments


def said(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    main(["inspect", str(path), "--json"])
    return json.loads(capsys.readouterr().out)


def folder_of_pictures(root: Path) -> Path:
    for name in ("cats/0.png", "cats/1.png", "dogs/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), "red").save(root / name)
    (root / "cats" / "notes.txt").write_text("no picture")
    return root


def test_a_picture_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(folder_of_pictures(tmp_path / "pictures"), capsys)
    assert found["kind"] == "pictures"
    assert found["facts"]["pictures"] == 3
    assert found["facts"]["first"] == "8x12 RGB"
    assert "2: cats, dogs" in found["facts"].values()
    assert "notes.txt" in "".join(found["ignored"])


def test_archives_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of_pictures(tmp_path / "pictures")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root))
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert [said(tmp_path / name, capsys)["facts"]["pictures"] for name in ("pictures.zip", "samples.npz")] == [3, 4]


def test_statistics_of_anyone_and_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = np.random.default_rng(0).standard_normal((50, 4))
    np.savez(tmp_path / "anyone.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    found = said(tmp_path / "anyone.npz", capsys)
    assert found["kind"] == "statistics of features"
    assert found["facts"]["features"] == 4
    assert any("--reference-count" in line for line in found["missing"])

    ours = Statistics(moments(torch.from_numpy(features)), num=50, extractor="inception", source="noise")
    save_statistics(tmp_path / "ours.npz", ours)
    found = said(tmp_path / "ours.npz", capsys)
    assert found["facts"]["extractor"] == "inception"
    assert found["facts"]["pictures"] == 50
    assert not any("--reference-count" in line for line in found["missing"])
