"""Save a training run, and resume it."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyndit import files, seals
from dyndit.errors import CheckpointError, InputError
from dyndit.training.config import BOOKKEEPING, FitConfig

Weights = dict[str, Tensor]

LOG = "losses.csv"
"""The log of the steps, in the run's folder, and in every checkpoint as far as the checkpoint goes."""


def to_cpu(weights: Weights) -> Weights:
    """Copy weights to the host's memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


class Ema:
    """Exponential moving average of the trained parameters (Polyak), one fused lerp per step.

    Not diffusers' EMAModel: it keeps a list of unnamed tensors and its own step count. Our checkpoints name every
    tensor.
    """

    def __init__(self, trainable: nn.Module, decay: float):
        self.trainable, self.decay = trainable, decay
        named = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters. The first steps move them faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters: list[Tensor] = list(self.parameters)
        torch._foreach_lerp_(self.averages, parameters, 1 - decay)  # pyright: ignore[reportPrivateUsage]  one kernel

    def state_dict(self) -> Weights:
        """Return the module's state dict with averages. Buffers and frozen parameters are the module's own."""
        return {**self.trainable.state_dict(), **dict(zip(self.names, self.averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, weights: Weights) -> None:
        """Load the averages of a checkpoint."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(weights[name])


@dataclass(frozen=True)
class Run:
    """Everything that a training step changes."""

    trainable: nn.Module
    optimizer: torch.optim.AdamW
    ema: Ema

    def tensors(self) -> dict[str, Weights]:
        """Return the contents of a checkpoint, by file name. Raises InputError: a weight is not finite."""
        for what, weights in (("weights", self.trainable.state_dict()), ("averages", self.ema.state_dict())):
            if odd := seals.first_not_finite(weights):
                raise InputError(
                    f"training: after the last step {odd} of the {what} is not finite, and is not saved; expected "
                    "finite numbers: try a lower learning_rate"
                )
        moments = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            moments.update({f"{key}.{self.ema.names[index]}": value for key, value in state.items()})
        return {"model": self.trainable.state_dict(), "ema": self.ema.state_dict(), "optimizer": moments}

    def load(self, tensors: dict[str, Weights]) -> None:
        """Restore weights, averages and the optimiser's moments."""
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
    """The checkpoints of one run: folders step-NNNNNN, each of safetensors, the log, and a state.json of hashes.

    A checkpoint is written beside its place, moved there when complete, and only then the oldest is deleted. So
    the last complete checkpoint always exists, also after a crash or on a full disk.
    """

    folder: Path
    config: FitConfig
    data_fingerprint: str
    identity: str  # names everything else that the run depends on
    world: int  # number of processes
    extend: bool = False  # take a run of fewer steps, whatever its schedule
    extended: list[int] = field(default_factory=list)
    """Steps at which the run was extended along the schedule of more steps, with `extend`."""

    def save(self, run: Run, step: int, log: str) -> Path:
        """Write the checkpoint of `step` and delete the oldest beyond `keep_checkpoints`.  log: text of its log."""
        place = self.folder / f"step-{step:06d}"
        with files.written_whole(place, folder=True) as draft:
            hashes = {}
            for name, tensors in run.tensors().items():
                path = draft / f"{name}.safetensors"
                files.write_safetensors(path, to_cpu(tensors))
                hashes[path.name] = files.sha256(path)
            files.write_text(draft / LOG, log)
            hashes[LOG] = files.sha256(draft / LOG)
            state = {
                "step": step,
                "config": asdict(self.config),
                "data_fingerprint": self.data_fingerprint,
                "identity": self.identity,
                "num_processes": self.world,
                "extended": self.extended,
                "sha256": hashes,
            }
            files.write_json(draft / "state.json", state | {"checksum": _checksum(state)})
            files.remove(place)  # if this step was saved before; the previous checkpoint remains
        self._prune()
        return place

    def _prune(self) -> None:
        for old in self._all()[self.config.keep_checkpoints :]:
            files.remove(old)

    def restore(self, run: Run, resume: bool = True, quiet: bool = False) -> tuple[int, str]:
        """Load the newest intact checkpoint into `run`. Return its step and its log; (0, "") without checkpoints."""
        found = self._all()
        if not found:
            return 0, ""
        if not resume:
            raise InputError(f"{self.folder.parent}: holds a run up to {found[0].name}; expected an empty folder")
        for place in found:
            try:
                state, tensors, log = _read_checkpoint(place)
            except CheckpointError as error:
                if not quiet:
                    print(f"{error}; trying the one before it", file=sys.stderr)
                continue
            self._check(place, state)
            self.extended[:] = state.get("extended", [])
            if state["config"]["steps"] != self.config.steps and self.config.schedule != "constant":
                self.extended.append(int(state["step"]))
            _check_shapes(place, tensors["model"], run.trainable.state_dict())
            run.load(tensors)
            if state["num_processes"] != self.world and not quiet:
                print(
                    f"{place}: written by {state['num_processes']} processes, going on with {self.world}: "
                    "same pictures, other random numbers from here on",
                    file=sys.stderr,
                )
            if not quiet:
                # Rename broken checkpoints, so that they do not count as the newest to keep.
                for broken in found[: found.index(place)]:
                    files.move(broken, broken.with_name(f"damaged-{broken.name}"))
                self._prune()
            return int(state["step"]), log
        raise CheckpointError(
            f"{self.folder}: found {len(found)} checkpoints, none intact; delete the folder to start over"
        )

    def _all(self) -> list[Path]:
        """List complete checkpoints, newest first."""
        found = [p for p in self.folder.glob("step-*") if p.name[5:].isdecimal()]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def _check(self, place: Path, state: dict[str, Any]) -> None:
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
        for name in (f.name for f in fields(self.config)):
            if name in BOOKKEEPING:
                continue
            now = getattr(self.config, name)
            then = state["config"].get(name)
            then = tuple(then) if isinstance(then, list) else then  # JSON knows no tuples
            if name == "steps" and self.config.schedule == "constant" and now >= state["step"]:
                continue
            if name == "steps" and now > then:
                if self.extend:
                    continue
                raise InputError(
                    f"{place}: made with steps {then} of the {self.config.schedule} schedule, found {now}; expected "
                    f"the same, or --extend to go on at the rates of {now} steps"
                )
            if now != then:
                raise InputError(
                    f"{place}: made with {name} {then!r}, found {now!r}; expected the same, or another output folder"
                )


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read_checkpoint(place: Path) -> tuple[dict[str, Any], dict[str, Weights], str]:
    path = place / "state.json"
    state = files.read_json(path)
    if state.pop("checksum", "none") != _checksum(state):
        raise CheckpointError(f"{path}: damaged, its checksum is another")
    try:
        hashes, expected_name = state["sha256"], f"step-{state['step']:06d}"
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if place.name != expected_name or not state.keys() >= {"config", "data_fingerprint", "num_processes"}:
        raise CheckpointError(f"{path}: not the state of {place.name}")
    names = {name: place / f"{name}.safetensors" for name in ("model", "ema", "optimizer")}
    for path in (*names.values(), place / LOG):
        if files.sha256(path) != hashes.get(path.name):
            raise CheckpointError(f"{path}: damaged, its sha256 is not the one noted in state.json")
    tensors = {name: files.read_safetensors(path)[0] for name, path in names.items()}
    return state, tensors, files.read_lines(place / LOG)


def _check_shapes(place: Path, found: Weights, expected: Weights) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(w[name].shape) if name in w else "no such tensor" for w in (found, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{place}: {name}: found {shapes[0]}, the model to train has {shapes[1]}")
