"""The comparison of backbones, on two tiny ones."""

from pathlib import Path

import pandas as pd
import pytest

from dyndit.analysis.compare.experiment import Inputs
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.recipes.studies import cifar10_backbones
from dyndit.storage import load as checkpoints
from support.models import randomise


def test_it_resumes_and_pairs_the_seeds(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10_backbones, "EXTRACTORS", ("resnet20-cifar10", "vgg-cifar10"))
    first = Path(inputs.model)
    other = checkpoints.load(inputs.model)
    assert isinstance(other.backbone, ClassConditionalDiT)
    randomise(other.backbone, seed=1)
    checkpoints.save(DynamicDepth(other.backbone, pixel_space=True), tmp_path / "other")
    both, out = (first, tmp_path / "other"), tmp_path / "out"
    cifar10_backbones.main((first,), inputs.data, Path(inputs.extractor_weights or ""), out, 4, 2)
    kept = (out / cifar10_backbones.ROWS).read_text()
    cifar10_backbones.main(both, inputs.data, Path(inputs.extractor_weights or ""), out, 4, 2)
    assert (out / cifar10_backbones.ROWS).read_text().startswith(kept)
    rows = pd.read_csv(out / cifar10_backbones.ROWS)
    assert len(rows) == 2 * 2 * 2
    mean = rows.pivot_table(index="extractor", columns="model", values="fd")
    said = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if str(both[1]) in line]
    for line in said:
        distance, difference = (float(cell.split(" ± ")[0]) for cell in line[2:])
        assert distance == pytest.approx(mean.loc[line[1], str(both[1])], abs=0.01)
        expected = mean.loc[line[1], str(both[1])] - mean.loc[line[1], str(first)]
        assert difference == pytest.approx(expected, abs=0.01)
    assert len(said) == 2

    randomise(other.backbone, seed=2)
    checkpoints.save(DynamicDepth(other.backbone, pixel_space=True), both[1])
    cifar10_backbones.main(both, inputs.data, Path(inputs.extractor_weights or ""), out, 4, 2)
    assert len(pd.read_csv(out / cifar10_backbones.ROWS)) == 2 * 2 * 3
    found = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if str(both[1]) in line]
    assert [line[2] for line in found] != [line[2] for line in said]
