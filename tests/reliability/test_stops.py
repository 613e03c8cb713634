"""Asked to stop, or out of memory, a run says so in one line and keeps what is whole"""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from dyndit import cli
from dyndit.cli import main
from dyndit.errors import InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.runtime import STOPS, stoppable
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill
from dyndit.training.fit import Task, fit
from dyndit.training.train import Train
from support.models import TINY
from support.stops import Plain, as_verb, ended, lingers, trains, waits

DIGITS = load_digits()
CONFIG = FitConfig(steps=4, batch_size=8, accumulation=2, learning_rate=1e-3, log_every=1, checkpoint_every=100)


@pytest.mark.reliability("Ctrl-C, SIGTERM and SIGHUP end every verb with one line and status 130, 143 or 129")
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_verb(number: int) -> None:
    status, words = ended(partial(as_verb, waits), (number,))
    assert status == 128 + number
    assert words.splitlines() == [
        f"dyndit: stopped ({signal.Signals(number).name}); what is written is whole, run the same again to go on"
    ]


@pytest.mark.reliability("A second signal ends every verb at once, and says so")
@pytest.mark.parametrize("second", STOPS)
def test_a_second_signal_ends_a_verb_at_once(second: int) -> None:
    began = time.monotonic()
    status, words = ended(partial(as_verb, lingers), (signal.SIGTERM, second), pause=0.3)
    assert status == 128 + second
    assert words.splitlines() == [f"dyndit: left at once ({signal.Signals(second).name})"]
    assert time.monotonic() - began < 15


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = {signal.SIGHUP: signal.SIG_IGN, signal.SIGINT: signal.default_int_handler}  # as under nohup
    before = {number: signal.signal(number, handler) for number, handler in before.items()}
    try:
        with stoppable() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert not caught
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def losses_of(out: Path, task: Task, config: FitConfig = CONFIG) -> np.ndarray:
    return fit(task, DIGITS, config, out, progress=False).losses.to_numpy()


@pytest.mark.reliability("A signal during training finishes the step, saves it, and says so in one line")
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_finishes_the_step(number: int, tmp_path: Path) -> None:
    work = partial(trains, tmp_path / "run", CONFIG, 3, 0.5)  # the first half of step 2
    status, words = ended(partial(as_verb, work), (number,))
    assert words.splitlines() == [f"{tmp_path / 'run'}: stopped at step 2 of 4; run the same again to go on"]
    assert status == 128 + number
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert np.array_equal(losses_of(tmp_path / "run", Plain()), losses_of(tmp_path / "whole", Plain()))


@pytest.mark.reliability("A second signal during training leaves at once; the last checkpoint is whole")
def test_a_second_signal_during_training(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_every=1)
    work = partial(trains, tmp_path / "run", config, 5, 20)
    status, words = ended(partial(as_verb, work), (signal.SIGTERM, signal.SIGTERM), pause=0.3)
    assert words.splitlines() == ["dyndit: left at once (SIGTERM)"]
    assert status == 143
    assert np.array_equal(losses_of(tmp_path / "run", Plain(), config), losses_of(tmp_path / "whole", Plain(), config))


def out_of_memory(most: int):
    """A device that holds `most` pictures at a time."""

    def react(_calls: int, rows: int) -> None:
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return react


@pytest.mark.reliability("Out of memory in training: smaller parts, the same batch, losses within 1e-6")
@pytest.mark.parametrize("most", [1, 2, 3])
def test_less_memory_gives_the_same_losses(most: int, tmp_path: Path, capsys) -> None:
    whole = losses_of(tmp_path / "whole", Plain())
    parts = losses_of(tmp_path / "parts", task := Plain(out_of_memory(most)))
    assert np.abs(parts - whole).max() < 1e-6
    assert task.calls > 2 * 2 * 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if most == 1 else 1)
    assert all(line.startswith("training: out of memory at step 1; from here on") for line in lines)


@pytest.mark.reliability("Backbones and exits train in smaller parts with losses within 1e-6")
def test_recipes_train_in_smaller_parts(make_model, tmp_path: Path, monkeypatch, capsys) -> None:
    embed = ClassConditionalDiT.embed

    def fits(self, x, *rest):
        out_of_memory(2)(0, len(x))
        return embed(self, x, *rest)

    recipes = {
        "train": lambda out: Train(TINY, CONFIG, "digits").run(DIGITS, out),
        "distill": lambda out: Distill(fit=CONFIG).run(make_model(), DIGITS, out),
    }
    for name, recipe in recipes.items():
        whole = recipe(tmp_path / f"{name}-whole")[1].losses.to_numpy()
        with monkeypatch.context() as patch:
            patch.setattr(ClassConditionalDiT, "embed", fits)
            parts = recipe(tmp_path / f"{name}-parts")[1].losses.to_numpy()
        assert np.abs(parts - whole).max() < 1e-6, name
    assert "out of memory" in capsys.readouterr().err


def test_one_picture_at_a_time_is_the_least(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="out of memory at step 1 with one picture at a time"):
        losses_of(tmp_path, Plain(out_of_memory(0)))


FAULTS = {
    "memory": (MemoryError(), 2, "out of memory"),
    "device memory": (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
    "safetensors": (SafetensorError("Error while deserializing header"), 2, "no readable safetensors"),
    "nameless": (OSError("broken"), 2, "broken"),
    "named": (FileNotFoundError(2, "No such file", "/x"), 2, "/x: No such file"),
    "linalg": (np.linalg.LinAlgError("SVD did not converge"), 2, "expected finite features"),
    "torch linalg": (torch.linalg.LinAlgError("linalg.eigh: failed\nto converge"), 2, "expected finite features"),
    "fault": (KeyError("x"), 1, "a fault of the program, KeyError"),
}


@pytest.mark.reliability("Errors of memory, files, matrices and other libraries: one line, status 2; faults of ours: 1")
@pytest.mark.parametrize("name", FAULTS)
def test_every_error_is_one_line(name: str, monkeypatch, capsys) -> None:
    error, status, words = FAULTS[name]

    def run() -> None:
        raise error

    monkeypatch.setattr(cli, "verbs", lambda _: {"run": run, "other": run})
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dyndit: ")
    assert words in line
    with pytest.raises(type(error)):
        main(["run", "--debug"])


@pytest.mark.reliability("A step that fails leaves a checkpoint of the step before it")
@pytest.mark.parametrize("error", [MemoryError("host"), OSError("nameless"), RuntimeError("device lost")])
def test_a_failed_step_leaves_a_checkpoint(error: Exception, tmp_path: Path) -> None:
    def react(calls: int, _rows: int) -> None:
        if calls >= 6:  # the second half of step 3
            raise error

    with pytest.raises((type(error), InputError)):
        losses_of(tmp_path / "run", Plain(react))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert np.array_equal(losses_of(tmp_path / "run", Plain()), losses_of(tmp_path / "whole", Plain()))


class Killed:
    """Digits whose loading process is killed at a picture."""

    can_flip, fingerprint = False, DIGITS.fingerprint

    def __init__(self, after: int) -> None:
        self.left = after

    def __len__(self) -> int:
        return len(DIGITS)

    def __getitem__(self, index: int):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return DIGITS[index]


@pytest.mark.reliability("A killed process that loads pictures: one line, and a checkpoint of the last step")
def test_a_killed_loader(tmp_path: Path) -> None:
    config = replace(CONFIG, num_workers=1, steps=40)
    with pytest.raises(InputError, match="a process that loads pictures died") as caught:
        fit(Plain(), Killed(160), config, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    (place,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 1 < int(place.name[-6:]) < 40
    assert np.array_equal(losses_of(tmp_path / "run", Plain(), config), losses_of(tmp_path / "whole", Plain(), config))


@pytest.mark.reliability("A loader that dies in the middle of an update: the update is finished, and saved")
def test_a_loader_that_dies_in_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(_number: int, _frame: object) -> None:
        raise RuntimeError("a loader died")

    class Struck(torch.optim.AdamW):
        """Hears of the death within its second step."""

        def step(self, closure: object = None) -> None:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGCHLD)
            super().step(closure)

    before = signal.signal(signal.SIGCHLD, died)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "AdamW", Struck)
            with pytest.raises(RuntimeError, match="a loader died"):
                fit(Plain(), DIGITS, CONFIG, tmp_path / "run", progress=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert [place.name for place in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert np.array_equal(losses_of(tmp_path / "run", Plain()), losses_of(tmp_path / "whole", Plain()))


@pytest.mark.reliability("The log belongs to the checkpoint: torn, cut, missing or foreign, no row is lost or doubled")
@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "zeros", "cut", "foreign"])
def test_the_log_belongs_to_the_checkpoint(damage: str, tmp_path: Path) -> None:
    whole = losses_of(tmp_path / "whole", Plain())
    losses_of(tmp_path / "run", Plain(), replace(CONFIG, steps=3))
    log = tmp_path / "run" / "losses.csv"
    text = log.read_bytes()
    damaged = {
        "empty": b"", "torn": text[:-9], "zeros": text + b"\0" * 50, "cut": text[: text.index(b"\n2,") + 1],
        "foreign": b"a,b\n1,2\n",
    }  # fmt: skip
    if damage == "missing":
        log.unlink()
    else:
        log.write_bytes(damaged[damage])
    assert np.array_equal(losses_of(tmp_path / "run", Plain()), whole)
    assert log.read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()


@pytest.mark.reliability("Any flipped bit of the newest checkpoint's state: the checkpoint before it is taken, said so")
def test_a_flip_in_the_state_falls_back(tmp_path: Path, capsys) -> None:
    config = replace(CONFIG, checkpoint_every=2)
    whole = losses_of(tmp_path / "whole", Plain(), config)
    state = tmp_path / "whole" / "checkpoints" / "step-000004" / "state.json"
    for number, position in enumerate(range(3, state.stat().st_size - 3, state.stat().st_size // 12)):
        content = bytearray(state.read_bytes())
        content[position] ^= 4
        state.write_bytes(content)
        assert np.array_equal(losses_of(tmp_path / "whole", Plain(), config), whole), (number, position)
        assert "trying the one before it" in capsys.readouterr().err
