"""What a process says of the precision it computes in."""

from dataclasses import replace
from pathlib import Path

import pytest

from dyndit import runtime
from dyndit.analysis.compare.experiment import Experiment, Variant
from dyndit.cli import main
from dyndit.errors import InputError
from dyndit.recipes.cifar10_frontier import experiment
from dyndit.training.config import FitConfig
from dyndit.training.distill import Distill


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_warned", set())
    monkeypatch.setattr(runtime, "emulates_bf16", lambda _: True)


@pytest.mark.usefixtures("emulated")
def test_emulated_bf16_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.warn_of_emulation("cpu", "fp32")
    assert not capsys.readouterr().err
    for _ in range(2):
        runtime.warn_of_emulation("cpu", "bf16")
    said = capsys.readouterr().err
    assert said == "warning: bf16 is emulated here, and slower than fp32; --dtype float32 computes in fp32\n"


@pytest.mark.usefixtures("emulated")
def test_a_training_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "digits", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    main([*run, "--dtype", "bfloat16"])
    assert capsys.readouterr().err.count("bf16 is emulated") == 1


def test_other_machines_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers in ((True, False), (False, True), (False, False)):
        for name, answer in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), answers, strict=True):
            monkeypatch.setattr(f"torch.cpu.{name}", lambda answer=answer: answer)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        assert runtime.emulates_bf16("cpu") is not any(answers)
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert not runtime.emulates_bf16("cpu")


def fits_of(chosen: Experiment) -> list[FitConfig]:
    """Every training that a comparison may carry out."""
    recipes = [chosen, *chosen.variants]
    found = [one.distill for one in recipes if one.distill is not None]
    fits = [fit for one in found for fit in (one.fit, one.recall_fit)]
    fits += [one.train.fit for one in recipes if one.train is not None]
    return fits + [chosen.peer_fit] * (chosen.peer_fit is not None)


def test_a_precision_reaches_every_training_of_a_comparison() -> None:
    assert experiment.train is not None
    halves = replace(experiment.distill, recall_fit=replace(experiment.distill.recall_fit, precision="bf16"))
    variants = (Variant("a", distill=halves), Variant("b", train=experiment.train), Variant("c", refinements=1))
    whole = replace(experiment, peer_fit=halves.fit, variants=variants)
    for precision in ("fp32", "bf16"):
        changed = whole.in_precision(precision)
        assert {fit.precision for fit in fits_of(changed)} == {changed.precision} == {precision}
        assert len(fits_of(changed)) == 7
        assert changed.in_precision("fp32") == whole.in_precision("fp32")  # nothing else changes
        assert changed.variants[2] == variants[2]


def test_distill_trains_both_in_the_precision_of_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(recipe: Distill, *_: object, **__: object) -> None:
        asked.append(recipe)
        raise InputError("asked")

    monkeypatch.setattr(Distill, "run", run)
    with pytest.raises(SystemExit):
        main(["distill", "digits", "--model", "digits", "--out", str(tmp_path / "run"), "--dtype", "bfloat16"])
    assert (asked[0].fit.precision, asked[0].recall_fit.precision) == ("bf16", "bf16")
