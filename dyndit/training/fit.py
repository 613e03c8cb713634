"""Train backbones and exits with one loop, on accelerate.

A step is a pure function of (weights, optimizer state, seed, step). The step's number seeds the choice of pictures
(`StepBatches`), their flips, and every random number of the loss. So a checkpoint holds no random state, and a
resumed run ends with the same bits as an uninterrupted run.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dyndit import files
from dyndit.errors import InputError, first_line
from dyndit.locks import locked
from dyndit.runtime import warn_of_emulation
from dyndit.training.batches import StepBatches
from dyndit.training.borrowed import modes_kept
from dyndit.training.checkpoints import Checkpoints, Ema, Run, Weights, to_cpu
from dyndit.training.config import FitConfig
from dyndit.training.log import Log
from dyndit.training.memory import Rows, in_parts, is_out_of_memory, smaller
from dyndit.training.stopping import any_caught, leave, outlive_signals, signals, undisturbed
from dyndit.training.trackers import log_with


class TrainingData(Protocol):
    """Data to train on: `Pictures`, or any data set whose item i is (x, y). y: a number or a dict of tensors."""

    can_flip: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]: ...


class Task(Protocol):
    """A module to train, and its loss.

    The loop moves `trainable` and the batches to the device. The task moves everything else that it holds, such as a
    frozen backbone, to `x.device`. Under precision "bf16" the loss runs under autocast.
    """

    trainable: nn.Module

    def draw(self, x: Tensor, y: Any, generator: torch.Generator, /) -> tuple[Tensor, Any]:
        """Return what `loss` takes for a batch, with every random number drawn: noise, timesteps.  x: (B, ...).

        The loop may cut the result into parts of fewer rows. By default return x and y as they are.
        """
        return x, y

    def loss(
        self, module: nn.Module, x: Tensor, y: Any, generator: torch.Generator, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scalar loss, a mean over rows, and scalar figures to log.  x, y: from `draw`, all rows or a part.

        `module` is `trainable`, prepared for this machine: call it, not `trainable`. Draw random numbers in `draw`
        from `generator` (on the CPU), which the loop seeds for this step; else the loss depends on how a batch is cut.
        """
        ...

    def preview(self, out: Path, step: int, ema: Weights) -> None:
        """Write sample pictures below `out`, from the averaged weights of `trainable`. By default write nothing."""


@dataclass(frozen=True, repr=False)
class FitResult:
    """Result of a training run after its last step. Weights are on the CPU."""

    ema: Weights  # exponential moving average, with the buffers; sample from it
    weights: Weights
    losses: pd.DataFrame  # a row per step: step (1-based), loss, learning_rate, grad_norm, the task's figures
    seconds: float  # of this call, without a resumed run's earlier part
    updates: int  # steps of this call
    extended: tuple[int, ...] = ()  # steps at which the run was extended along another schedule
    beside: float = 0.0  # seconds of what a recipe did besides these steps

    def whole(self, steps: int) -> float:
        """Return the seconds of all `steps`, at this call's pace, and of what came beside. NaN: this call took none."""
        return self.seconds / self.updates * steps + self.beside if self.updates else math.nan

    def __repr__(self) -> str:
        last = f"{len(self.losses)} steps" + (f", loss {self.losses['loss'].iloc[-1]:.4g}" if len(self.losses) else "")
        return f"FitResult({last}, {len(self.ema)} tensors, {self.seconds:.1f} s)"


def fit(
    task: Task,
    data: TrainingData,
    config: FitConfig,
    out: Path,
    *,
    identity: str = "",
    rates: Mapping[str, float] | None = None,
    resume: bool = True,
    extend: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train `task.trainable` in place on `data`. Write checkpoints, losses.csv and the tracker's logs to `out`.

    Go on from the newest intact checkpoint in `out`, bit for bit as if never stopped. Return at once if it is the
    last step's. On SIGINT, SIGTERM or SIGHUP, finish the step, write a checkpoint and leave. If a step fails, write a
    checkpoint of the step before it. If memory runs out, cut the micro-batches into smaller parts and try again.

    A run of a constant rate goes on to more steps by itself, and then ends with the bits of a run of so many steps.
    extend: take up a run of fewer steps under a cosine schedule too. From its last checkpoint on, the rates are those
    of a run of `config.steps`: they jump up there, so the result is another than such a run's. An extended run that
    was stopped resumes with equal bits, as any other.

    identity: names everything else that the result depends on, such as the hash of a frozen backbone. A run resumes
    only under the same identity. rates: factors of the learning rate, by prefix of the parameters' names; 1 for others.

    Raises InputError if the loss diverges, if `out` holds a run of another configuration, identity or other data, if
    another process trains there, or if it holds any run and `resume` is False. Raises CheckpointError if no checkpoint
    of a run is intact.
    """
    started, out, tracker = time.monotonic(), Path(out), log_with(config.tracker)
    # Leave precision to the autocast below. accelerate would patch the module's forward for good, and refuse
    # a second precision in one process.
    accelerator = Accelerator(
        mixed_precision="no", gradient_accumulation_steps=config.accumulation, log_with=tracker, project_dir=out
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(f"accelerate: found {accelerator.distributed_type}, expected one or many plain processes")
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if is_main:
        warn_of_emulation(accelerator.device.type, config.precision)
    parts = (0, config.steps, config.accumulation, rank, world)
    groups = getattr(data, "groups", ())  # of `Pictures` of several shapes
    batches = StepBatches(len(data), config.batch_size, config.seed, *parts, groups)

    trainable = task.trainable
    device = accelerator.device
    trainable.to(device)
    run = Run(trainable, _optimizer(trainable, config, rates or {}), Ema(trainable, config.ema_decay))
    checkpoints = Checkpoints(out / "checkpoints", config, data.fingerprint, identity, world, extend)
    with locked(out) if is_main else nullcontext():
        if is_main:
            files.sweep(out)
        first, text = checkpoints.restore(run, resume, quiet=not is_main)
        torch.clear_autocast_cache()  # as after every step: these weights are others
        log = Log(out, first, text, config, accelerator, progress and is_main)
        accelerator.wait_for_everyone()
        if first < config.steps:
            loading = _loading(data, replace(batches, start=first), config.num_workers, device)
            _train(task, data, config, out, accelerator, run, checkpoints, first, log, loading)
    seconds = 0.0 if first == config.steps else time.monotonic() - started
    weights = to_cpu(run.ema.state_dict()), to_cpu(trainable.state_dict())
    return FitResult(*weights, log.read(), seconds, config.steps - first, tuple(checkpoints.extended))


def _train(
    task: Task,
    data: TrainingData,
    config: FitConfig,
    out: Path,
    accelerator: Accelerator,
    run: Run,
    checkpoints: Checkpoints,
    first: int,
    log: Log,
    loading: AbstractContextManager[Iterator[tuple[Tensor, Rows]]],
) -> None:
    """Run the steps after the `first`."""
    trainable, device, is_main = task.trainable, accelerator.device, accelerator.is_main_process
    alone = accelerator.num_processes == 1
    prepared, optimizer = accelerator.prepare(trainable, run.optimizer)
    module: Any = torch.compile(prepared) if config.compile else prepared
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    flip = config.flip and data.can_flip
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    generator, num_parts, saved, buffers = torch.Generator(), 1, first, list(trainable.buffers())

    def gradients(step: int, loaded: list[tuple[Tensor, Rows]]) -> list[dict[str, Tensor]]:
        """Add up the gradients of a step's micro-batches. Return their figures."""
        figures = []
        accelerator.step = 0  # it counts micro-batches; a step that is tried again starts anew
        for micro, batch in enumerate(loaded):
            x, y = send_to_device(batch, device, non_blocking=True)
            seed = _seed(config.seed, step, micro, accelerator.process_index)
            generator.manual_seed(seed)
            torch.manual_seed(seed)  # for dropout, which takes no generator
            if flip:
                mirrored = torch.rand(len(x), generator=generator) < 0.5
                x = torch.where(mirrored.to(device).view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
            with autocast:
                x, y = task.draw(x, y, generator)
            with accelerator.accumulate(prepared):
                means: dict[str, Tensor] = {}
                for share, part, drawn in in_parts(x, y, num_parts):
                    with autocast:
                        loss, extra = task.loss(module, part, drawn, generator)
                    accelerator.backward(loss * share)
                    for name, value in {"loss": loss, **extra}.items():
                        means[name] = means.get(name, 0) + value.detach() * share
            figures.append(means)
        return figures

    def save(step: int) -> None:
        nonlocal saved
        if is_main:
            checkpoints.save(run, step, log.text)
        saved = step

    with (
        torch.autocast(device.type, enabled=False),  # a caller's: backward would run under it
        modes_kept(trainable),
        signals() as caught,
        torch.random.fork_rng([device] if device.type == "cuda" else []),  # the loop seeds it at every step
        loading as micro_batches,
        undisturbed() as deaths,
        log,
    ):
        trainable.train()
        whole: int | None = first  # the step that the weights are of; None while they change
        step, before = first, [buffer.clone() for buffer in buffers]  # statistics of batches
        try:
            for step in range(first, config.steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * config.learning_rate_at(step)
                before = [buffer.clone() for buffer in buffers]
                loaded, figures = [next(micro_batches) for _ in range(config.accumulation)], None
                while figures is None:
                    try:
                        figures = gradients(step, loaded)
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error) or not alone:
                            raise
                        num_parts = smaller(num_parts, len(loaded[0][0]), step + 1, error)
                    if figures is None:  # the error, which holds on to tensors, is gone here
                        trainable.zero_grad()
                        torch.cuda.empty_cache()
                        _restore(buffers, before)
                norm: Any = accelerator.clip_grad_norm_(parameters, config.grad_clip or float("inf"))
                whole = None
                optimizer.step()
                optimizer.zero_grad()
                torch.clear_autocast_cache()  # within a caller's autocast the casts of the old weights would stay
                run.ema.update(step)
                log.add(step + 1, config.learning_rate_at(step), norm, figures)
                done = whole = step + 1
                if deaths:
                    raise deaths[0]
                is_last = done == config.steps
                due = is_last or done % config.checkpoint_every == 0
                stop = any_caught(caught, accelerator, is_last or step % config.log_every == 0)
                if due or stop or done % config.log_every == 0 or step == first:  # figures from the first step on
                    log.flush()  # raises if the loss is not finite, so broken weights are never saved
                if due or stop:
                    save(done)
                    accelerator.wait_for_everyone()
                if stop:
                    leave(caught, done, config.steps, out, is_main)
                if config.sample_every and done % config.sample_every == 0:
                    if is_main:
                        task.preview(out, done, run.ema.state_dict())
                    accelerator.wait_for_everyone()
        except Exception:
            if whole == step:
                _restore(buffers, before)
            if whole is not None and saved < whole and alone:
                log.flush()
                save(whole)
            raise


@torch.no_grad()
def _restore(buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _seed(*numbers: int) -> int:
    """Mix (seed, step, micro-step, rank) into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _optimizer(trainable: nn.Module, config: FitConfig, rates: Mapping[str, float]) -> torch.optim.AdamW:
    named = [(name, p) for name, p in trainable.named_parameters() if p.requires_grad]
    if not named:
        raise InputError(f"{type(trainable).__name__}: found no parameter to train, expected at least one")

    def rate(item: tuple[str, nn.Parameter]) -> float:
        return next((factor for prefix, factor in rates.items() if item[0].startswith(prefix)), 1.0)

    # Group only neighbours of one rate: checkpoints name moments by the order of the parameters.
    groups = [{"params": [p for _, p in group], "rate": factor} for factor, group in groupby(named, rate)]
    # Fused: one kernel for all parameters of a group. On a CPU the default loops over them in Python.
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True)


@contextmanager
def _loading(
    data: TrainingData, batches: StepBatches, num_workers: int, device: torch.device
) -> Iterator[Iterator[tuple[Tensor, Rows]]]:
    """Load the micro-batches with workers that ignore caught signals.  Pictures: x (B, C, H, W), y (B,)."""
    over = multiprocessing.Event()
    items: Any = data
    loader = DataLoader(
        items,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise a loader draws from the global generator
        worker_init_fn=partial(outlive_signals, over),
    )
    try:
        yield iter(loader)
    except InputError as error:
        # A worker's error arrives as its whole traceback, "...\ndyndit.errors.InputError: the message".
        *traceback, last = str(error.args[0]).strip().splitlines()
        if traceback:
            raise InputError(last.split(": ", 1)[-1]) from None
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:  # a torn connection: it died while it sent a batch
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"training: a process that loads pictures died ({first_line(error)}); expected memory for {num_workers} "
            "of them, or fewer num_workers"
        ) from error
    finally:
        over.set()
