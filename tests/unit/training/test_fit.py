"""The training loop: same seed, same bits, also after a stop, a crash or a damaged checkpoint."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dyndit import files
from dyndit.errors import CheckpointError, InputError
from dyndit.training.config import FitConfig
from dyndit.training.data import PictureFolder, load_digits
from dyndit.training.fit import FitResult, Task, fit

CONFIG = FitConfig(
    steps=12,
    batch_size=16,
    learning_rate=1e-2,
    accumulation=2,
    warmup_steps=3,
    log_every=5,
    checkpoint_every=4,
    ema_decay=0.9,
    seed=3,
)
DIGITS = load_digits()


class Denoise(Task):
    """Predict the picture from a noisy one; dropout, batch statistics and a frozen part on purpose."""

    def __init__(self, width: int = 16, noise: float = 1.0):
        torch.manual_seed(0)
        self.trainable = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 64)
        )
        self.trainable[1].bias.requires_grad_(False)
        self.noise, self.previews = noise, []

    def loss(
        self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn(x.shape, generator=generator)
        loss = (module(x + self.noise * noise) - x.flatten(1)).float().square().mean()
        return loss, {"root": loss.sqrt()}

    def preview(self, out: Path, step: int, ema: dict[str, Tensor]) -> None:
        self.previews.append((step, ema["4.weight"].clone()))
        torch.rand(3)  # a preview that draws random numbers changes nothing


def run(out: Path, config: FitConfig = CONFIG, task: Denoise | None = None, data=DIGITS, **options) -> FitResult:
    return fit(task or Denoise(), data, config, out, progress=False, **options)


def same(a: FitResult, b: FitResult) -> bool:
    """Bit-equal weights, averages and losses."""
    tensors = [(a.weights[n], b.weights[n]) for n in a.weights] + [(a.ema[n], b.ema[n]) for n in a.ema]
    return all(torch.equal(x, y) for x, y in tensors) and a.losses.equals(b.losses)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, Path]:
    out = tmp_path_factory.mktemp("whole")
    return run(out), out


def steps_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_rates_scale_the_learning_rate_of_parameters_by_name(tmp_path: Path) -> None:
    start, config = Denoise().trainable.state_dict(), replace(CONFIG, steps=1, warmup_steps=0)
    plain, still = run(tmp_path / "a", config), run(tmp_path / "b", config, rates={"4.": 0.0})
    for name, _ in Denoise().trainable.named_parameters():
        assert torch.equal(still.weights[name], start[name] if name.startswith("4.") else plain.weights[name])
    assert not torch.equal(plain.weights["4.weight"], start["4.weight"])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(whole, tmp_path: Path) -> None:
    torch.manual_seed(99)
    task = Denoise()
    state = torch.get_rng_state()
    again = run(tmp_path / "again", task=task)
    assert same(again, whole[0])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are the caller's
    assert not same(run(tmp_path / "other", replace(CONFIG, seed=4)), whole[0])


def test_bookkeeping_changes_nothing_in_the_weights(whole, tmp_path: Path) -> None:
    config = replace(CONFIG, log_every=1, checkpoint_every=100, keep_checkpoints=1, sample_every=2, num_workers=1)
    task = Denoise()
    assert same(run(tmp_path, config, task), whole[0])
    assert [step for step, _ in task.previews] == [2, 4, 6, 8, 10, 12]
    assert torch.equal(task.previews[-1][1], whole[0].ema["4.weight"])
    assert steps_of(tmp_path) == ["step-000012"]


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_a_stopped_run_ends_with_the_same_bits(whole, tmp_path: Path, stop: int) -> None:
    run(tmp_path, replace(CONFIG, steps=stop))
    resumed = run(tmp_path)
    assert len(resumed.losses) == CONFIG.steps
    assert same(resumed, whole[0])
    # Guard: the part before the stop matters, and so does the optimizer's state.
    assert not torch.equal(resumed.ema["1.weight"], resumed.weights["1.weight"])


def test_an_extended_run_follows_the_longer_schedule_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    """Under a cosine: the rates of four steps of four, then of steps five to eight of eight."""
    short, long = (replace(CONFIG, schedule="cosine", steps=steps, checkpoint_every=2) for steps in (4, 8))

    class Dies(Denoise):
        calls = 0

        def loss(self, *args):
            self.calls += 1
            if self.calls == 5:  # the first half of the third step that is added
                raise RuntimeError("no power")
            return super().loss(*args)

    for name in ("a", "b"):
        run(tmp_path / name, short)
    extended = run(tmp_path / "a", long, extend=True)
    rates = [*map(short.learning_rate_at, range(4)), *map(long.learning_rate_at, range(4, 8))]
    assert extended.losses["learning_rate"].tolist() == rates
    with pytest.raises(RuntimeError, match="no power"):
        run(tmp_path / "b", long, Dies(), extend=True)
    resumed = run(tmp_path / "b", long)  # it is of eight steps now: nothing is extended again
    assert same(resumed, extended)
    assert resumed.extended == extended.extended == (4,)
    with pytest.raises(InputError, match="made with steps 8, found 4"):
        run(tmp_path / "a", short, extend=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(whole, tmp_path: Path, number: int) -> None:
    class Interrupted(Denoise):
        calls = 0

        def loss(self, *args):
            self.calls += 1
            if self.calls == 11:  # the first half of step 6
                os.kill(os.getpid(), number)
            return super().loss(*args)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        run(tmp_path, task=Interrupted())
    assert signal.getsignal(number) is before
    assert steps_of(tmp_path)[-1] == "step-000006"
    assert same(run(tmp_path), whole[0])


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Dies(Denoise):
        calls = 0

        def loss(self, *args):
            self.calls += 1
            if self.calls == 22:  # step 11: steps 9 and 10 are noted in losses.csv, but in no checkpoint
                raise Killed
            return super().loss(*args)

    with pytest.raises(Killed):
        run(tmp_path, task=Dies())
    assert len(pd.read_csv(tmp_path / "losses.csv")) == 10
    (tmp_path / "checkpoints" / ".writing-step-000012").mkdir()  # and it died while it was writing
    assert same(run(tmp_path), whole[0])
    assert steps_of(tmp_path) == ["step-000008", "step-000012"]


@pytest.mark.parametrize("tail", [b"9,0.31", b"\0" * 40, b"9,0.31\0\0"])
def test_a_torn_line_of_the_log_is_cut_off(whole, tmp_path: Path, tail: bytes) -> None:
    run(tmp_path, replace(CONFIG, steps=8))
    log = tmp_path / "losses.csv"
    log.write_bytes(log.read_bytes() + tail)
    assert same(run(tmp_path), whole[0])
    assert log.read_bytes() == (whole[1] / "losses.csv").read_bytes()


def test_a_finished_run_returns_at_once(whole) -> None:
    class Never(Denoise):
        def loss(self, *args):
            raise AssertionError

    result, out = whole
    task = Never()
    assert same(run(out, task=task), result)
    assert torch.equal(task.trainable[1].weight, result.weights["1.weight"])


@pytest.mark.reliability("A damaged checkpoint is named, and the one before it used")
@pytest.mark.parametrize("name", ["model", "ema", "optimizer", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    whole, tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path, replace(CONFIG, steps=8))
    path = tmp_path / "checkpoints" / "step-000008" / (name if "." in name else f"{name}.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit: safetensors would load it
    path.write_bytes(content[:-2] if name == "state.json" else content)
    assert same(run(tmp_path, replace(CONFIG, keep_checkpoints=1)), whole[0])
    assert path.name in capsys.readouterr().err
    assert steps_of(tmp_path) == ["damaged-step-000008", "step-000012"]


def test_no_intact_checkpoint_is_an_error_and_deletes_nothing(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=8))
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="found 2 checkpoints, none intact"):
        run(tmp_path)
    assert steps_of(tmp_path) == ["step-000004", "step-000008"]


@pytest.mark.reliability("A full disk leaves a valid checkpoint, also if only one is kept")
def test_the_oldest_checkpoint_goes_only_after_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, replace(CONFIG, steps=8, keep_checkpoints=1))
    assert steps_of(tmp_path) == ["step-000008"]

    def full_disk(tensors, path, metadata):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    save_file = files.save_file
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(InputError, match="No space"):
        run(tmp_path, replace(CONFIG, keep_checkpoints=1))
    assert "step-000008" in steps_of(tmp_path)
    assert "step-000012" not in steps_of(tmp_path)
    monkeypatch.undo()
    run(tmp_path, replace(CONFIG, keep_checkpoints=1))
    assert steps_of(tmp_path) == ["step-000012"]


def test_another_configuration_data_or_model_is_refused(whole, tmp_path: Path) -> None:
    _, out = whole
    for field, value in {"learning_rate": 2e-2, "batch_size": 32, "seed": 5, "betas": (0.9, 0.99)}.items():
        with pytest.raises(InputError, match=f"made with {field} "):
            run(out, replace(CONFIG, steps=20, **{field: value}))
    with pytest.raises(InputError, match="made with steps 12"):
        run(out, replace(CONFIG, steps=8))  # fewer than were run
    with pytest.raises(InputError, match="identity"):
        run(out, identity="another backbone")
    with pytest.raises(CheckpointError, match=r"1\.bias: found \(16,\), the model to train has \(8,\)"):
        run(out, task=Denoise(width=8))
    with pytest.raises(InputError, match="holds a run up to step-000012"):
        run(out, resume=False)

    other = load_digits()
    other.fingerprint = "other"
    with pytest.raises(InputError, match="the data"):
        run(out, data=other)

    cosine = replace(CONFIG, schedule="cosine", steps=4)
    run(tmp_path, cosine)
    with pytest.raises(InputError, match="made with steps 4"):
        run(tmp_path, replace(cosine, steps=8))  # the learning rates so far would have been others


def test_accumulation_is_a_big_batch_in_parts(tmp_path: Path) -> None:
    class Plain(Denoise):
        """Nothing that depends on the batch mates or on chance."""

        def __init__(self):
            super().__init__(noise=0.0)
            self.trainable[2], self.trainable[3] = nn.Identity(), nn.Identity()

    results = [run(tmp_path / str(n), replace(CONFIG, accumulation=n, grad_clip=0.3), Plain()) for n in (1, 2, 4)]
    for other in results[1:]:
        assert np.allclose(other.losses["loss"], results[0].losses["loss"], rtol=1e-5)
        assert np.allclose(other.losses["grad_norm"], results[0].losses["grad_norm"], rtol=1e-4)
        for name, expected in results[0].ema.items():
            assert torch.allclose(other.ema[name], expected, atol=1e-4), name
    assert (results[0].losses["grad_norm"] > 0.3).any()  # the clipping was at work


def test_the_average_is_the_formula(tmp_path: Path) -> None:
    class Recording(Denoise):
        """Notes the weights before every step, and so after the one before it."""

        def __init__(self):
            super().__init__()
            self.seen = []

        def loss(self, *args):
            self.seen.append(self.trainable[4].weight.detach().double().clone())
            return super().loss(*args)

    task = Recording()
    result = run(tmp_path, task=task)
    average, after = task.seen[0], [*task.seen[2::2], result.weights["4.weight"].double()]
    assert len(after) == CONFIG.steps
    for step, weight in enumerate(after):
        decay = min(CONFIG.ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(result.ema["4.weight"].double(), average, atol=1e-6)
    assert torch.equal(result.ema["1.bias"], result.weights["1.bias"])  # frozen
    assert torch.equal(result.ema["2.running_mean"], result.weights["2.running_mean"])  # a buffer


def test_the_learning_rate_rises_and_falls_as_configured() -> None:
    config = replace(CONFIG, learning_rate=1.0, warmup_steps=4, steps=12)
    assert [config.learning_rate_at(s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = [replace(config, schedule="cosine").learning_rate_at(s) for s in range(4, 13)]
    assert cosine == pytest.approx([0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(9)])


def test_losses_are_noted_for_every_step(whole) -> None:
    result, out = whole
    assert list(result.losses) == ["step", "loss", "learning_rate", "grad_norm", "root"]
    assert result.losses["step"].tolist() == list(range(1, 13))
    assert result.losses["learning_rate"].tolist() == [CONFIG.learning_rate_at(s) for s in range(12)]
    assert result.losses["loss"].iloc[-3:].mean() < result.losses["loss"].iloc[:3].mean()
    assert list((out / "tensorboard").glob("events*"))
    stored = load_file(out / "checkpoints" / "step-000012" / "ema.safetensors")
    assert all(torch.equal(stored[name], result.ema[name]) for name in result.ema)


@pytest.mark.reliability("A loss or gradient that is not finite stops training; nothing broken is saved")
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path, broken: str) -> None:
    class Diverges(Denoise):
        calls = 0

        def loss(self, *args):
            loss, figures = super().loss(*args)
            self.calls += 1
            if self.calls == 14:  # the second half of step 7
                first = self.trainable[4].bias.sum()
                loss = loss * float("nan") if broken == "loss" else loss + (first - first.detach()).sqrt()
            return loss, figures

    with pytest.raises(InputError, match="at step 7 the loss is"):
        run(tmp_path, task=Diverges())
    assert steps_of(tmp_path) == ["step-000004"]  # nothing broken was saved
    assert len(pd.read_csv(tmp_path / "losses.csv")) == 5


def test_pictures_are_mirrored_only_where_the_data_allow_it(tmp_path: Path) -> None:
    class Seen(Denoise):
        def __init__(self):
            super().__init__()
            self.pictures = []

        def loss(self, module, x, y, generator):
            self.pictures.append(x)
            return super().loss(module, x, y, generator)

    flippable = load_digits()
    flippable.can_flip = True
    seen: dict[str, Tensor] = {}
    for name, data, flip in [("no", DIGITS, True), ("off", flippable, False), ("yes", flippable, True)]:
        task = Seen()
        run(tmp_path / name, replace(CONFIG, flip=flip), task, data=data)
        seen[name] = torch.cat(task.pictures)
    assert torch.equal(seen["no"], seen["off"])
    kept = (seen["yes"] == seen["off"]).all(dim=(1, 2, 3))
    mirrored = (seen["yes"] == seen["off"].flip(-1)).all(dim=(1, 2, 3))
    assert (kept | mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7


def test_bf16_keeps_the_weights_in_fp32_and_leaves_no_trace(tmp_path: Path) -> None:
    class Dtype(Denoise):
        def loss(self, module, x, y, generator):
            self.computed = module[1](module[0](x)).dtype
            return super().loss(module, x, y, generator)

    task = Dtype()
    result = run(tmp_path, replace(CONFIG, steps=1, accumulation=1, batch_size=2, precision="bf16"), task)
    assert task.computed == torch.bfloat16
    assert {t.dtype for n, t in result.ema.items() if "num" not in n} == {torch.float32}
    assert "forward" not in task.trainable.__dict__
    assert task.trainable.training == Denoise().trainable.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_no_bit(precision: str, tmp_path: Path) -> None:
    """Within it the inner autocast does not drop its casts: a step would run on the weights before it."""
    config = replace(CONFIG, precision=precision)
    alone = run(tmp_path / "alone", config)
    with torch.autocast("cpu", torch.bfloat16):
        task = Denoise()
        with torch.no_grad():
            task.trainable.eval()(DIGITS[0][0][None])  # casts the first weights, without gradients
        task.trainable.train()
        within = run(tmp_path / "within", config, task)
        ended = task.trainable.eval()(DIGITS[0][0][None])
    assert same(alone, within)
    fresh = Denoise().trainable
    fresh.load_state_dict(within.weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ended, fresh.eval()(DIGITS[0][0][None]))


def test_the_mode_of_every_module_is_given_back(tmp_path: Path) -> None:
    task = Denoise()
    task.trainable.eval()
    task.trainable[3].train()
    run(tmp_path, replace(CONFIG, steps=1), task)
    assert [module.training for module in task.trainable] == [False, False, False, True, False]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for name in ("a.png", "b.png", "cut.png"):
        Image.fromarray(DIGITS.uint8([0])[0, 0].numpy()).save(tmp_path / "data" / "cat" / name)
    cut = tmp_path / "data" / "cat" / "cut.png"
    data = PictureFolder(tmp_path / "data", channels=1)
    data.check()
    cut.write_bytes(cut.read_bytes()[:-30])  # damaged after the check: training meets it
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out", replace(CONFIG, num_workers=num_workers), data=data)
    assert str(caught.value).startswith(f"{cut}: unreadable")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("schedule", "linear"), ("precision", "fp16"), ("ema_decay", 1.0)],
)
def test_a_bad_value_is_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        replace(CONFIG, **{field: value})


def test_a_batch_that_accumulation_cannot_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size: found 16"):
        run(tmp_path / "out", replace(CONFIG, accumulation=3))
    assert not (tmp_path / "out").exists()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("dyndit.progress.PATIENCE", 0.0)
    monkeypatch.delenv("DYNDIT_PROGRESS")
    fit(Denoise(), DIGITS, replace(CONFIG, checkpoint_every=100), tmp_path)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "training: 0 s"
    assert last.startswith("training: 12 of 12 steps, ")
    assert ", loss " in last
    assert "steps/s" in last


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PLAIN_RUN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "two"],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    plain: dict = {}
    exec(PLAIN_RUN.split("# run")[0], plain)
    one = fit(plain["task"], DIGITS, plain["config"], tmp_path / "one", progress=False)
    two = load_file(tmp_path / "two" / "checkpoints" / "step-000006" / "ema.safetensors")
    losses = pd.read_csv(tmp_path / "two" / "losses.csv")
    assert np.allclose(losses, one.losses, rtol=1e-4)
    assert all(torch.allclose(one.ema[name], two[name], atol=1e-5) for name in two)
    assert not torch.allclose(two["1.weight"], torch.ones(64, 64), atol=1e-3)  # something was learned


PLAIN_RUN = """
import sys
from pathlib import Path
import torch
from torch import nn
from dyndit.training.fit import FitConfig, Task, fit

class Plain(Task):
    def __init__(self):
        self.trainable = nn.Sequential(nn.Flatten(), nn.Linear(64, 64))
        nn.init.ones_(self.trainable[1].weight)
        nn.init.zeros_(self.trainable[1].bias)

    def loss(self, module, x, y, generator):
        return (module(x) - x.flatten(1)).square().mean(), {}

task = Plain()
config = FitConfig(steps=6, batch_size=16, learning_rate=1e-2, accumulation=2, log_every=2)
# run
from dyndit.training.data import load_digits
fit(task, load_digits(), config, Path(sys.argv[1]), progress=False)
"""
