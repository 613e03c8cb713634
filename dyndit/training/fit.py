"""The one training loop: backbones and exits are trained by the same `fit`, on accelerate.

A step is a pure function of (weights, optimizer state, seed, step): which pictures it sees (`StepBatches`),
how they are flipped, and every random number of its loss are seeded by the step's number. So a checkpoint
holds no random state, and a run that was stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import groupby
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, DistributedType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dyndit.errors import CheckpointError, InputError
from dyndit.training.data import StepBatches

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class FitConfig:
    """How to train. A step is one update of the weights, whatever the accumulation and the processes."""

    steps: int
    batch_size: int  # pictures per step, over all micro-batches and all processes together
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0  # learning rate rises linearly from 0
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    accumulation: int = 1  # micro-batches per step
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights, EMA and optimizer stay fp32
    ema_decay: float = 0.9999  # reached by the warm-up min(decay, (1 + s) / (10 + s))
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    sample_every: int = 0  # 0: never
    gradient_checkpointing: bool = False  # switched on in the module by who builds it; the loop cannot know how
    flip: bool = True  # mirror half of the pictures, if the data allow it
    num_workers: int = 0
    compile: bool = False

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("warmup_steps", "sample_every", "num_workers", "grad_clip", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least 0")
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"schedule: found {self.schedule!r}, expected 'constant' or 'cosine'")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision: found {self.precision!r}, expected 'fp32' or 'bf16'")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay: found {self.ema_decay}, expected at least 0 and below 1")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step s = 0, 1, ...: the schedule has no state."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))


# Fields that change nothing in the weights a run ends with: they may differ when it is resumed.
_BOOKKEEPING = {"log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "num_workers"}

_STATE_KEYS = {"config", "data_fingerprint", "num_processes"}


class TrainingData(Protocol):
    """What is trained on: `Pictures`, or any data set whose item i is (x, y), y a number or a dict of tensors."""

    can_flip: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int | dict[str, Tensor]]: ...


class Task(Protocol):
    """What is trained, and by which loss.

    The loop moves `trainable` and the batches to the device; what else a task holds (a frozen trunk) it moves
    itself, to `x.device`. Under precision "bf16" the loss runs under autocast.
    """

    trainable: nn.Module

    def loss(
        self, module: nn.Module, x: Tensor, y: Tensor | dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalar figures to log, for a batch of the data: of pictures x: (B, C, H, W), y: (B,).

        `module` is `trainable`, prepared for this machine: call it, not `trainable`. Every random number
        comes from `generator` (on the CPU), which the loop has seeded for this step.
        """

    def preview(self, out: Path, step: int, ema: Weights) -> None:
        """Write pictures for the eye below `out`, from the averaged weights of `trainable`."""


@dataclass(frozen=True)
class FitResult:
    """What a training run leaves, as of its last step; weights on the CPU."""

    ema: Weights  # exponential moving average, with the buffers: what to sample from
    weights: Weights
    losses: pd.DataFrame  # a row per step: step (1-based), loss, learning_rate, grad_norm, the task's figures
    seconds: float  # of this call; a resumed run's earlier part is not in it


def fit(
    task: Task,
    data: TrainingData,
    config: FitConfig,
    out: Path,
    *,
    identity: str = "",
    rates: Mapping[str, float] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> FitResult:
    """Train `task.trainable` in place on `data`; checkpoints, losses.csv and TensorBoard logs go to `out`.

    Goes on from the newest intact checkpoint in `out`, bit for bit as if never stopped; returns at once if
    that is the last step's. SIGINT and SIGTERM finish the step, write a checkpoint and leave. `identity` is
    what else the result depends on, say the hash of a frozen trunk: a run resumes under the same one only.
    `rates` are factors of the learning rate, by the prefix of the parameters' names; 1 for all others.

    Raises InputError if `out` holds a run of another configuration, identity or other data, or any run
    without `resume`, and if the loss diverges; CheckpointError if no checkpoint of a run is intact.
    """
    started = time.monotonic()
    # Precision is left to the autocast below: accelerate would patch the module's forward for good, and
    # refuses a second precision in one process.
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=config.accumulation,
        log_with="tensorboard",
        project_dir=out,
    )
    if accelerator.distributed_type in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
        DistributedType.MEGATRON_LM,
    ):
        raise InputError(f"accelerate: found {accelerator.distributed_type}, expected one or many plain processes")
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    batches = StepBatches(len(data), config.batch_size, config.seed, 0, config.steps, config.accumulation, rank, world)

    trainable = task.trainable
    device = accelerator.device
    trainable.to(device)
    run = _Run(trainable, _optimizer(trainable, config, rates or {}), _Ema(trainable, config.ema_decay))
    checkpoints = Checkpoints(Path(out) / "checkpoints", config, data.fingerprint, identity, world)
    first = checkpoints.restore(run, resume, quiet=not is_main)
    log = _Log(Path(out), first, config, accelerator, progress and is_main)
    accelerator.wait_for_everyone()
    if first == config.steps:
        return FitResult(_to_cpu(run.ema.state_dict()), _to_cpu(trainable.state_dict()), log.read(), 0.0)

    prepared, optimizer = accelerator.prepare(trainable, run.optimizer)
    module = torch.compile(prepared) if config.compile else prepared
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
    flip = config.flip and data.can_flip
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    generator = torch.Generator()

    with (
        _training(trainable),
        _signals() as caught,
        _own_rng(device),
        _loading(data, replace(batches, start=first), config.num_workers, device) as micro_batches,
        log,
    ):
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * config.learning_rate_at(step)
            figures: list[dict[str, Tensor]] = []
            for micro in range(config.accumulation):
                x, y = (_moved(part, device) for part in next(micro_batches))
                seed = _seed(config.seed, step, micro, rank)
                generator.manual_seed(seed)
                torch.manual_seed(seed)  # for dropout inside of a module, which knows no generator
                if flip:
                    mirrored = torch.rand(len(x), generator=generator) < 0.5
                    x = torch.where(mirrored.to(device)[:, None, None, None], x.flip(-1), x)
                with accelerator.accumulate(prepared):
                    with autocast:
                        loss, extra = task.loss(module, x, y, generator)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
                    optimizer.step()
                    optimizer.zero_grad()
                figures.append({"loss": loss.detach(), **{k: v.detach() for k, v in extra.items()}})
            run.ema.update(step)
            log.add(step + 1, config.learning_rate_at(step), norm, figures)

            done = step + 1
            due = done == config.steps or done % config.checkpoint_every == 0
            stop = done < config.steps and _any(caught, accelerator, step % config.log_every == 0)
            if due or stop or done % config.log_every == 0:
                log.flush()  # raises if the loss is not finite, so that no broken weights are ever saved
            if due or stop:
                if is_main:
                    checkpoints.save(run, done)
                accelerator.wait_for_everyone()
            if stop:
                _leave(caught, done, config.steps, Path(out), is_main)
            if config.sample_every and done % config.sample_every == 0:
                if is_main:
                    task.preview(Path(out), done, run.ema.state_dict())
                accelerator.wait_for_everyone()

    return FitResult(
        _to_cpu(run.ema.state_dict()),
        _to_cpu(trainable.state_dict()),
        log.read(),
        time.monotonic() - started,
    )


def _seed(*numbers: int) -> int:
    """Mix (seed, step, micro-step, rank) into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _moved(part: Tensor | dict[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in part.items()}


def _to_cpu(weights: Weights) -> Weights:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def _optimizer(trainable: nn.Module, config: FitConfig, rates: Mapping[str, float]) -> torch.optim.AdamW:
    named = [(name, p) for name, p in trainable.named_parameters() if p.requires_grad]
    if not named:
        raise InputError(f"{type(trainable).__name__}: found no parameter to train, expected at least one")

    def rate(item: tuple[str, nn.Parameter]) -> float:
        return next((factor for prefix, factor in rates.items() if item[0].startswith(prefix)), 1.0)

    # Neighbours of one rate make a group, so that parameters keep the order by which checkpoints name their moments.
    groups = [{"params": [p for _, p in group], "rate": factor} for factor, group in groupby(named, rate)]
    # One kernel for all parameters of a group: on a CPU the default loops over them in Python.
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True)


class _Ema:
    """Exponential moving average of the trained parameters (Polyak), one fused lerp per step.

    Own lines in place of diffusers' EMAModel: that one keeps an anonymous list of tensors, while checkpoints
    here name every tensor; and its step count is state of its own.
    """

    def __init__(self, trainable: nn.Module, decay: float):
        self.trainable, self.decay = trainable, decay
        named = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def state_dict(self) -> Weights:
        """Every entry of the module's state dict; buffers and frozen parameters as they are in the module."""
        return {**self.trainable.state_dict(), **dict(zip(self.names, self.averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, weights: Weights) -> None:
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(weights[name])


@dataclass(frozen=True)
class _Run:
    """All that a training step changes."""

    trainable: nn.Module
    optimizer: torch.optim.AdamW
    ema: _Ema

    def tensors(self) -> dict[str, Weights]:
        """Contents of a checkpoint, by file name."""
        moments = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            moments.update({f"{key}.{self.ema.names[index]}": value for key, value in state.items()})
        return {"model": self.trainable.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments}

    def load(self, tensors: dict[str, Weights]) -> None:
        self.trainable.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {
            index: {key: tensors["optimizer"][f"{key}.{name}"] for key in keys}
            for index, name in enumerate(self.ema.names)
            if f"step.{name}" in tensors["optimizer"]  # a parameter that never got a gradient has no moments
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: folders step-NNNNNN of safetensors, with hashes, and a state.json.

    A checkpoint is written beside its place and moved there when whole; only then is the oldest deleted. So
    at every moment, also after a crash or on a full disk, the last complete one is there.
    """

    folder: Path
    config: FitConfig
    data_fingerprint: str
    identity: str  # what else the run depends on
    world: int  # number of processes

    def save(self, run: _Run, step: int) -> Path:
        """Write the checkpoint of `step` and delete the oldest beyond `keep_checkpoints`."""
        place = self.folder / f"step-{step:06d}"
        draft = self.folder / f"writing-step-{step:06d}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        hashes = {}
        for name, tensors in run.tensors().items():
            path = draft / f"{name}.safetensors"
            save_file(_to_cpu(tensors), path)
            hashes[path.name] = _sha256(path)
        state = {
            "step": step,
            "config": asdict(self.config),
            "data_fingerprint": self.data_fingerprint,
            "identity": self.identity,
            "num_processes": self.world,
            "sha256": hashes,
        }
        (draft / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in [*draft.iterdir(), draft]:
            _sync(path)
        if place.exists():
            shutil.rmtree(place)
        draft.replace(place)
        _sync(self.folder)
        for old in self._all()[self.config.keep_checkpoints :]:
            shutil.rmtree(old)
        return place

    def restore(self, run: _Run, resume: bool = True, quiet: bool = False) -> int:
        """Load the newest intact checkpoint into `run` and return its step; 0 if there is none at all."""
        found = self._all()
        if not found:
            return 0
        if not resume:
            raise InputError(f"{self.folder.parent}: holds a run up to {found[0].name}; expected an empty folder")
        for place in found:
            try:
                state, tensors = _read_checkpoint(place)
            except CheckpointError as error:
                if not quiet:
                    print(f"{error}; trying the one before it", file=sys.stderr)
                continue
            self._check(place, state)
            _check_shapes(place, tensors["model"], run.trainable.state_dict())
            run.load(tensors)
            if state["num_processes"] != self.world and not quiet:
                print(
                    f"{place}: written by {state['num_processes']} processes, going on with {self.world}: "
                    "same pictures, other random numbers from here on",
                    file=sys.stderr,
                )
            if not quiet:
                # Out of the way of the numbering, so that no broken checkpoint counts as the newest to keep.
                for broken in found[: found.index(place)]:
                    shutil.rmtree(broken.with_name(f"damaged-{broken.name}"), ignore_errors=True)
                    broken.replace(broken.with_name(f"damaged-{broken.name}"))
            return int(state["step"])
        raise CheckpointError(
            f"{self.folder}: found {len(found)} checkpoints, none intact; delete the folder to start over"
        )

    def _all(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        found = [p for p in self.folder.glob("step-*") if p.name[5:].isdecimal()]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def _check(self, place: Path, state: dict) -> None:
        if state["data_fingerprint"] != self.data_fingerprint:
            raise InputError(
                f"{place}: made with the data {state['data_fingerprint'][:12]}..., "
                f"found {self.data_fingerprint[:12]}...; expected the same pictures, or another output folder"
            )
        if state.get("identity", "") != self.identity:
            raise InputError(
                f"{place}: made with the identity {state.get('identity', '')!r}, found {self.identity!r}; "
                "expected the same frozen parts, or another output folder"
            )
        for field in fields(self.config):
            if field.name in _BOOKKEEPING:
                continue
            now = getattr(self.config, field.name)
            then = state["config"].get(field.name)
            then = tuple(then) if isinstance(then, list) else then  # JSON knows no tuples
            if field.name == "steps" and self.config.schedule == "constant" and now >= state["step"]:
                continue
            if now != then:
                raise InputError(
                    f"{place}: made with {field.name} {then!r}, found {now!r}; "
                    "expected the same, or another output folder"
                )


def _read_checkpoint(place: Path) -> tuple[dict, dict[str, Weights]]:
    try:
        state = json.loads((place / "state.json").read_text())
        hashes = state["sha256"]
        expected_name = f"step-{state['step']:06d}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place / 'state.json'}: damaged or missing ({error})") from error
    if place.name != expected_name or not state.keys() >= _STATE_KEYS:
        raise CheckpointError(f"{place / 'state.json'}: not the state of {place.name}")
    tensors = {}
    for name in ("model", "ema", "optimizer"):
        path = place / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if _sha256(path) != hashes.get(path.name):
            raise CheckpointError(f"{path}: damaged, its sha256 is not the one noted in state.json")
        tensors[name] = load_file(path)
    return state, tensors


def _check_shapes(place: Path, found: Weights, expected: Weights) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(w[name].shape) if name in w else "no such tensor" for w in (found, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{place}: {name}: found {shapes[0]}, the model to train has {shapes[1]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk: a rename is no promise about the content before it."""
    if os.name != "posix" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Log:
    """Losses of every step: to losses.csv, TensorBoard, and a bar (a terminal) or plain lines (elsewhere).

    Figures stay on the device until `flush`, so that a step does not wait for them.
    """

    def __init__(self, out: Path, first: int, config: FitConfig, accelerator: Accelerator, show: bool):
        self.path, self.config, self.accelerator, self.show = out / "losses.csv", config, accelerator, show
        self.rows: list[tuple[int, float, list[str], Tensor]] = []
        self.last, self.last_time = first, time.monotonic()
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():  # steps after the checkpoint are run, and noted, again
                if first == 0:
                    self.path.unlink()
                else:
                    kept = self.read()
                    kept[kept["step"] <= first].to_csv(self.path.with_suffix(".tmp"), index=False)
                    self.path.with_suffix(".tmp").replace(self.path)
        self.console = Console()
        self.bar: Progress | None = None
        if show and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} steps/s "),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=config.steps, completed=first, loss=float("nan"), rate=0.0)

    def __enter__(self) -> _Log:
        self.accelerator.init_trackers("tensorboard")
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        for tracker in self.accelerator.trackers:  # end_training() would also end the process group
            tracker.finish()

    def read(self) -> pd.DataFrame:
        if not self.path.is_file():
            return pd.DataFrame()
        # Through Python's float: pandas 2 parses to within a bit, and a resumed run's losses are to be equal.
        return pd.read_csv(self.path, dtype=str).astype(float).astype({"step": int})

    def add(self, step: int, learning_rate: float, norm: Tensor, figures: list[dict[str, Tensor]]) -> None:
        """Note one step from the figures of its micro-batches."""
        names = list(figures[0])
        means = torch.stack([torch.stack([f[name].float() for name in names]) for f in figures]).mean(0)
        self.rows.append((step, learning_rate, ["grad_norm", *names], torch.cat([norm.float()[None], means])))
        if self.bar:
            self.bar.advance(self.task)

    def flush(self) -> None:
        """Write out what was noted. Raises InputError at the first step whose loss is not finite."""
        if not self.rows:
            return
        names = self.rows[0][2]
        values = self.accelerator.reduce(torch.stack([row[3] for row in self.rows]), "mean").double().cpu()
        frame = pd.DataFrame(values.numpy(), columns=names)
        frame.insert(0, "step", [row[0] for row in self.rows])
        frame.insert(2, "learning_rate", [row[1] for row in self.rows])
        frame = frame[["step", "loss", "learning_rate", "grad_norm", *names[2:]]]
        self.rows.clear()
        bad = frame[~np.isfinite(frame[["loss", "grad_norm"]]).all(axis=1)]
        if len(bad):
            row = bad.iloc[0]
            raise InputError(
                f"training: at step {int(row.step)} the loss is {row.loss:g} and its gradient's norm "
                f"{row.grad_norm:g}, expected finite numbers; try a lower learning_rate or a longer warm-up"
            )
        if self.accelerator.is_main_process:
            frame.to_csv(self.path, mode="a", header=not self.path.is_file(), index=False)
        step, now = int(frame["step"].iloc[-1]), time.monotonic()
        means = frame.drop(columns="step").mean().to_dict()
        rate = (step - self.last) / max(now - self.last_time, 1e-9)
        self.last, self.last_time = step, now
        self.accelerator.log({**means, "steps_per_second": rate}, step=step)
        if self.bar:
            self.bar.update(self.task, loss=means["loss"], rate=rate)
        elif self.show:
            left = (self.config.steps - step) / rate
            print(
                f"step {step}/{self.config.steps}  loss {means['loss']:.4f}  {rate:.2f} steps/s  "
                f"{left / 60:.1f} min left",
                flush=True,
            )


@contextmanager
def _training(trainable: nn.Module) -> Iterator[None]:
    """Put the module into training mode, and back into the mode it came in."""
    was_training = {module: module.training for module in trainable.modules()}
    trainable.train()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _own_rng(device: torch.device) -> AbstractContextManager:
    """Give the caller's global random state back after the loop has seeded it step by step."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one acts as it always does."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _loading(
    data: TrainingData, batches: StepBatches, num_workers: int, device: torch.device
) -> Iterator[Iterator[tuple[Tensor, Tensor | dict[str, Tensor]]]]:
    """Give the micro-batches, of pictures x: (B, C, H, W) and y: (B,), from workers that outlive caught signals."""
    over = multiprocessing.Event()
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # a loader draws from the global one otherwise
        worker_init_fn=partial(_outlive_signals, over),
    )
    try:
        yield iter(loader)
    except InputError as error:
        # A worker's error arrives as its whole traceback, "...\ndyndit.errors.InputError: the message".
        *traceback, last = str(error).strip().splitlines()
        if traceback:
            raise InputError(last.split(": ", 1)[-1]) from None
        raise
    finally:
        over.set()


def _outlive_signals(over: Event, _worker: int) -> None:
    """Ctrl-C and job managers signal every process; a worker is needed until the step is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.is_set() else None)


def _any(caught: list[int], accelerator: Accelerator, meet: bool) -> bool:
    """Was a signal caught, here or, asked on the steps where all processes `meet`, in any process?"""
    if accelerator.num_processes == 1:
        return bool(caught)
    return meet and bool(accelerator.reduce(torch.tensor(len(caught), device=accelerator.device)))


def _leave(caught: list[int], step: int, steps: int, out: Path, say: bool) -> None:
    if say:
        print(f"{out}: stopped at step {step} of {steps}; run the same again to go on", file=sys.stderr)
    if signal.SIGINT in caught:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
