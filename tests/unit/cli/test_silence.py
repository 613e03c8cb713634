"""Long work speaks: every stage that can take seconds names itself, from every verb and every public function.

Where there is no terminal a stage says its name after `PATIENCE` seconds. The tests set it to 0, so that nothing is
timed: what would speak in a long run speaks in a tiny one.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dyndit
from dyndit import progress
from dyndit.analysis.metrics.quality import evaluate
from dyndit.calibration.calibrate import calibrate_steps, measure_bases
from dyndit.cli import VERBS, main
from dyndit.plans.step_counts import LatencyBudget
from dyndit.plans.table import ShiftTable
from dyndit.sampling.sample import sample_into
from dyndit.training.data import load_digits
from dyndit.training.latents import encode_latents
from support.autoencoders import make_autoencoder
from support.tiny_verbs import RECIPE

SMALL = ["--num-pictures", "70", "--batch-size", "35", "--table-steps", "2", "--num-bands", "1", "--num-depths", "1"]


@pytest.fixture(scope="module", autouse=True)
def _at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "PATIENCE", 0.0)
        patch.delenv("DYNDIT_PROGRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silence")
    (folder / "recipe.py").write_text(RECIPE.replace("budgets=(0.9,)", "budgets=(1.0,)"))  # whatever the times say
    return folder


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": ("train {root}/recipe.py --out {root}/backbone", ["training", "saving the model"]),
    "distill": (
        "distill {root}/recipe.py --model {root}/backbone --out {root}/model",
        ["loading {root}/backbone", "training", "saving the model", "measuring exit errors"],
    ),
    "calibrate": (
        "calibrate {root}/model --budget 1 --steps 2 " + " ".join(SMALL),
        [
            "loading {root}/model",
            "loading the extractor digits",
            "features by digits",
            "measuring distribution shifts",
            "timing the parts of a step",
            "searching 2 steps at 1",
            "measuring the plan, then full depth, on fresh pictures",
        ],
    ),
    "sample": (
        "sample {root}/model --out {root}/samples --num-images 70 --steps 2",
        ["loading {root}/model", "sampling 70 pictures", "writing samples.npz"],
    ),
    "evaluate": (
        "evaluate {root}/samples --reference digits --extractor digits --metrics fd",
        ["loading the extractor digits", "reading the samples set", "reading the reference set", "computing metrics"],
    ),
    "bench": (
        "bench {root}/model --batch-size 1 --rounds 1 --until 0 --steps 2",
        ["loading {root}/model", "batch of 1: warming up", "batch of 1: peak memory", "batch of 1: timing"],
    ),
    "compare": (
        "compare {root}/recipe.py --out {root}/run --model {root}/backbone",
        [
            "training",
            "measuring exit errors",
            "measuring distribution shifts",
            "searching plans",
            "warming up",
            "counting arithmetic",
            "sampling and scoring",
            "writing the report",
        ],
    ),
    "report": ("report {root}/run --out {root}/report", ["writing the report"]),
    "convert": ("convert {root}/model {root}/converted", ["loading {root}/model", "writing {root}/converted"]),
    "info": ("info {root}/model", ["loading {root}/model"]),
    "inspect": ("inspect {root}/model", ["looking at {root}/model"]),
    "grid": ("grid {root}/samples {root}/samples --out {root}/grid.png", []),
}
"""A command of each verb that works long, in an order in which each finds what it needs, and its stages.

Quickstart is `compare` of a recipe, demo prepares a model as compare does, and plan reads a file.
"""


def test_every_verb_is_walked_through() -> None:
    assert COMMANDS.keys() | {"quickstart", "demo", "plan"} == VERBS.keys()


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_stage_of_a_verb_says_its_name(verb: str, root: Path, capsys) -> None:
    command, expected = COMMANDS[verb]
    main(command.format(root=root).split())
    err = capsys.readouterr().err
    for title in ["loading PyTorch and diffusers", *expected]:
        title = title.format(root=root)
        assert any(line.startswith(f"{title}: ") for line in err.splitlines()), (title, err)


def spoken(work: Callable[[], object]) -> str:
    with contextlib.redirect_stderr(heard := io.StringIO()):
        work()
    return heard.getvalue()


def test_python_speaks_too(root: Path, tmp_path: Path) -> None:
    """The public functions that take long, one after the other on a tiny model."""
    heard = spoken(lambda: dyndit.load(root / "model"))
    assert heard.startswith(f"loading {root / 'model'}: ")
    model, digits = dyndit.load(root / "model"), dyndit.load_extractor("digits")
    assert spoken(lambda: dyndit.sample(model, [1, 2], num_steps=2)).startswith("sampling 2 pictures: ")
    assert not spoken(lambda: dyndit.sample(model, [1, 2], num_steps=2, progress=False))
    heard = spoken(lambda: sample_into(tmp_path / "set", model, None, 2, num_steps=2))
    assert "sampling 2 pictures: " in heard
    assert "writing samples.npz: 2 of 2 pictures" in heard
    settings = dyndit.CalibrationSettings(num_pictures=70, num_bands=1, batch_size=35, num_depths=1)
    options = {"extractor": digits, "reference": load_digits().uint8(), "settings": settings, "num_steps": 2}
    heard = spoken(lambda: dyndit.calibrate(model, budget=1.0, **options))
    for title in (
        "features by digits",
        "measuring distribution shifts",
        "timing the parts of a step",
        "measuring full depth at 2 steps",
        "searching 2 steps at 1",
        "measuring the plan, then full depth, on fresh pictures",
    ):
        assert f"{title}: " in heard, title
    table = ShiftTable.load(root / "model" / "shift-table.safetensors")
    heard = spoken(lambda: measure_bases(model, table, digits, step_grid=(1, 2)))
    assert "measuring full depth at 1 steps: " in heard
    table = measure_bases(model, table, digits, step_grid=(1,))
    heard = spoken(lambda: calibrate_steps(model, LatencyBudget(1.0), table=table, extractor=digits, rounds=6))
    assert "measuring full depth at the reference's steps: " in heard
    assert "timing the plan: " in heard
    assert "computing metrics: " in spoken(lambda: evaluate(root / "samples", load_digits().uint8(), digits, ("fd",)))
    fit = dyndit.FitConfig(1, 8)
    recipe = dyndit.Distill(fit=fit, states="sampler", num_trajectories=2, num_steps=2, forecasts=True)
    heard = spoken(lambda: recipe.run(dyndit.load(root / "backbone"), load_digits(), tmp_path / "exits"))
    for title in ("sampling 2 pictures", "training", "learning forecasts"):
        assert f"{title}: " in heard, title
    vae = make_autoencoder(tmp_path / "vae")
    heard = spoken(lambda: encode_latents(load_digits(), vae, tmp_path / "latents", 512))
    assert "encoding: 1797 of 1797 pictures" in heard


@contextmanager
def noted(calls: list[tuple]) -> Iterator[Callable]:
    yield lambda *call: calls.append(call)


def test_a_batch_moves_step_by_step(root: Path, monkeypatch) -> None:
    """Sampling never stands at 0 of an unknown total while a batch is drawn."""
    calls: list[tuple] = []
    monkeypatch.setattr("dyndit.sampling.sample.progress_bar", lambda *_, **__: noted(calls))
    dyndit.sample(dyndit.load("digits"), [1, 2, 3], num_steps=4, batch_size=2, cfg_scale=1.0)
    assert calls == [(done, 8) for done in range(1, 9)]


def test_the_first_step_of_a_training_has_figures(monkeypatch, tmp_path: Path) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr("dyndit.training.log.progress_bar", lambda *_, **__: noted(calls))
    recipe = dyndit.Distill(exits=dyndit.ExitConfig((6,)), fit=dyndit.FitConfig(3, 4, log_every=50))
    recipe.run(dyndit.load("digits"), load_digits(), tmp_path)
    words = [call[2] for call in calls if len(call) == 3]
    assert [call[:2] for call in calls if len(call) == 3] == [(1, 3), (3, 3)]
    assert all(word.startswith("loss ") and "nan" not in word and not word.endswith(" 0.00 steps/s") for word in words)


def test_bench_keeps_its_rows_as_they_come(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Ctrl-C after the first round of the second batch size: what was timed is printed, and lies in the file."""
    from dyndit.analysis.compare import bench_verdict

    out, ratios, rounds = tmp_path / "times.csv", bench_verdict.ratios, []

    def interrupted(rows: object) -> str:
        rounds.append(out.read_text().count("\n") - 1)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return ratios(rows)

    monkeypatch.setattr(bench_verdict, "ratios", interrupted)
    sizes = ["--batch-size", "1", "2", "--rounds", "2", "--until", "0", "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(root / "model"), *sizes, "--out", str(out)])
    assert stop.value.code == 130
    assert rounds == [4, 8, 12]  # two arms, each in two scopes
    said = capsys.readouterr()
    assert "noise to uint8, batch of 1, 2 rounds:" in said.out
    assert "noise to uint8, batch of 2, 1 rounds:" in said.out
    assert f"dyndit: stopped; 12 timed calls are kept in {out}" in said.err
    assert "run the same again" not in said.err


def test_a_finished_batch_size_is_printed_before_the_next_begins(root: Path, capsys, monkeypatch) -> None:
    from dyndit.analysis.compare import bench_verdict

    seen: list[str] = []
    ratios = bench_verdict.ratios
    monkeypatch.setattr(bench_verdict, "ratios", lambda rows: seen.append(capsys.readouterr().out) or ratios(rows))
    main(["bench", str(root / "model"), "--batch-size", "1", "2", "--rounds", "1", "--until", "0", "--steps", "2"])
    assert "batch of 1" not in seen[0]
    assert "batch of 1, 1 rounds" in seen[1]
