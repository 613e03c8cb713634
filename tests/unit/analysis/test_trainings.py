"""Backbones trained alike: resumable rows, paired by training seed, a report that verifies, a figure."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

import dyndit
from dyndit.analysis import read_runs, summary
from dyndit.analysis.compare import trainings as module
from dyndit.analysis.compare.trainings import Trainings, final_loss, run
from dyndit.analysis.report.verify import verify
from dyndit.errors import InputError
from dyndit.models.dit import DiTConfig
from dyndit.recipes.studies import conditioning, conditioning_exits, ladder
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.subset import Some
from dyndit.training.train import Train

FIT = FitConfig(steps=3, batch_size=8, learning_rate=1e-3, ema_decay=0.5)
TINY = DiTConfig(8, 4, 1, width=24, num_blocks=2, num_heads=2, num_classes=10)
ALIKE = Trainings(
    {name: Train(replace(TINY, conditioning=name), FIT) for name in ("adaln-zero", "in-context")},
    *("digits", "digits"),
    num_pictures=100,
    seeds=(0, 1),
    steps=2,
    num_images=20,
    batch_size=10,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ALIKE, tmp_path_factory.mktemp("alike") / "run", console=Console(quiet=True))


def test_every_training_has_a_row_and_a_model(done: Path) -> None:
    runs, costs = read_runs(done), pd.read_csv(done / "trainings.csv")
    assert set(zip(runs["settings"], runs["block"], strict=True)) == {
        (name, seed) for name in ALIKE.recipes for seed in ALIKE.seeds
    }
    assert len(costs) == 4
    assert set(costs["tokens"]) == {4, 6}
    plain = costs[costs["name"] == "adaln-zero"].iloc[0]
    assert plain["training_flops"] == 6 * plain["macs"] * plain["pictures"]
    assert plain["pictures"] == 24
    assert costs["loss"].between(0.1, 3).all()
    for name in ALIKE.recipes:
        found = dyndit.load(done / "models" / f"{name}-s1").backbone.config()
        assert found == vars(replace(TINY, conditioning=name))


def test_differences_are_paired_by_training_seed_and_the_report_verifies(done: Path) -> None:
    runs = read_runs(done)
    table = summary(runs).set_index("family")
    fd = runs.pivot(index="block", columns="settings", values="fd")
    assert table.loc["in-context", "fd_diff"].mean == pytest.approx((fd["in-context"] - fd["adaln-zero"]).mean())
    assert verify(done) == []
    page = (done / "report.md").read_text()
    assert "trainings.png" in page
    best, other = sorted(fd, key=lambda name: fd[name].mean())
    answer = page.split("## Which backbone is best\n\n")[1].split("\n\n")[0]
    assert answer.startswith(f"**Lowest FD-digits of 2 backbones: {best} {fd[best].mean():.2f} ±")
    assert f"then {other} {fd[other].mean():.2f} ±" in answer
    assert "2 training seeds" in page
    assert "saved at unchanged quality" not in page.split("## Runs")[0]


def test_what_is_done_is_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (done / "runs.csv").read_bytes()
    trained = []
    original = module._trained
    monkeypatch.setattr(module, "_trained", lambda *given: trained.append(given[-1]) or original(*given))
    run(ALIKE, done, console=Console(quiet=True))
    assert (done / "runs.csv").read_bytes() == before
    lines = [f"{line.rpartition(',')[0]}\n" for line in before.decode().splitlines()]  # without their checksum
    (done / "runs.csv").write_text("".join(lines[:-1]))  # killed before the last row
    run(ALIKE, done, console=Console(quiet=True))
    assert trained == ["in-context"]
    old, new = pd.read_csv(done / "runs.csv").iloc[-1], lines[-1]
    assert f"{old['fd']}"[:8] in new  # the same training, the same pictures
    assert len(pd.read_csv(done / "trainings.csv")) == 4
    with pytest.raises(InputError, match="holds another run"):
        run(replace(ALIKE, steps=3), done, console=Console(quiet=True))


def test_the_loss_is_of_the_same_noise_for_every_model() -> None:
    digits = load_digits()
    torch.manual_seed(0)
    model = dyndit.DynamicDepth(TINY.build())
    assert final_loss(model, digits) == final_loss(model, digits)
    assert final_loss(model, digits) == pytest.approx(1, abs=0.1)  # a fresh model predicts zero


def test_some_pictures_are_every_class_in_turn() -> None:
    digits = load_digits()
    some = Some(digits, 25)
    assert some.labels == [i % 10 for i in range(25)]
    for index in (0, 13, 24):
        x, y = some[index]
        assert y == some.labels[index]
        assert torch.equal(((x + 1) * 8 * 255 / 16).round().to(torch.uint8), some.uint8([index])[0])
    assert len(Some(digits, len(digits)).labels) == len(digits)
    assert some.fingerprint != Some(digits, 26).fingerprint
    with pytest.raises(InputError, match="asked for 1798 pictures, found 1797"):
        Some(digits, 1798)


def test_the_studies_differ_in_one_thing_each() -> None:
    for study in conditioning.STUDIES.values():
        assert list(study.recipes) == ["adaln-zero", "in-context", "cross-attention", "adaln"]
        assert len({replace(r.backbone, conditioning="adaln") for r in study.recipes.values()}) == 1
        assert len({r.fit for r in study.recipes.values()}) == 1
        assert len(study.seeds) == 3
    exits = conditioning_exits.experiment
    assert (exits.solvers[0], exits.cfg_scale) == (
        conditioning.STUDIES["digits"].solver,
        conditioning.STUDIES["digits"].cfg_scale,
    )
    assert set(exits.dynamic_steps) < set(exits.full_steps)
    patches = ladder.STUDIES["patches"].recipes.values()
    assert {(8 // r.backbone.patch_size) ** 2 for r in patches} == {4, 16, 64}
    assert len({replace(r.backbone, patch_size=2) for r in patches}) == 1
    sizes = [sum(p.numel() for p in r.outline().parameters()) for r in ladder.STUDIES["sizes"].recipes.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 4
