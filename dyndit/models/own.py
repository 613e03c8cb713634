"""Check a user's own backbone when a model is made of it, so that a mistake is one clear line there and then.

The attributes are looked at, and one call of two rows is run through embed, the first block, the head and an exit. The
backbones of this package have tests instead.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from dyndit.errors import InputError, first_line
from dyndit.models.base import Backbone, Inputs, State
from dyndit.models.conditions import Conditioning
from dyndit.process import Process

PAGE = "docs/how-to/my-own-model.md"
_METHODS = {
    "embed": "embed(x, t, y) -> State",
    "block": "block(index, state) -> State",
    "head": "head(state) -> prediction",
    "new_exit_head": "new_exit_head() -> a module, a copy of the final layer",
    "unpatchify": "unpatchify(patches, state) -> prediction",
}
_ATTRIBUTES = {
    "num_blocks": "the number of blocks, at least 1",
    "width": "the width of the tokens, at least 1",
    "sample_shape": "(channels, height, width), or (channels, frames, height, width)",
    "out_channels": "the channels of a prediction, at least 1",
    "condition": "a kind of condition, such as dyndit.ClassLabels(10)",
}
_log = logging.getLogger(__name__)


def check_backbone(backbone: object, process: Process | None) -> None:
    """Refuse a module that is no backbone, and a user's backbone that does not do as it says.

    process: the process that the user names; None: the backbone's usual one.

    Raises:
        InputError: no `Backbone`, a missing method or attribute, a failing call, or a wrong shape.
    """
    name = type(backbone).__name__
    if not isinstance(backbone, Backbone):
        kind = "an nn.Module" if isinstance(backbone, nn.Module) else "no module"
        raise InputError(f"backbone: {name} is {kind}; expected a subclass of dyndit.Backbone that cuts it ({PAGE})")
    if backbone.foreign or type(backbone).__module__.startswith("dyndit."):
        return
    _check_attributes(backbone, name)
    declared = any("usual_process" in vars(kind) for kind in type(backbone).__mro__ if kind is not Backbone)
    if process is None and not (declared or "usual_process" in vars(backbone)):
        assumed = "%s: says no process; %s is assumed (usual_process = ... says another)"
        _log.warning(assumed, name, backbone.usual_process)
    process = process or backbone.usual_process
    if not isinstance(process, Process):
        raise InputError(f"{name}: process {process!r:.60}; expected dyndit.DDPM() or dyndit.RectifiedFlow()")
    channels, out = backbone.in_channels, backbone.out_channels
    if out not in (channels, 2 * channels) or (out != channels and not process.has_variance):
        expected = f"{channels} or, with a learned variance, {2 * channels}" if process.has_variance else channels
        raise InputError(f"{name}: out_channels {out}; expected {expected}, as sample_shape and {process} say")
    if not any(tensor.is_meta for tensor in backbone.state_dict().values()):
        _DryRun(backbone, name, process).run()


def _check_attributes(backbone: Backbone, name: str) -> None:
    for method, meaning in _METHODS.items():
        if getattr(type(backbone), method) is getattr(Backbone, method):
            raise InputError(f"{name}: has no method {method}; expected {meaning} ({PAGE})")
    for attribute, meaning in _ATTRIBUTES.items():
        if not hasattr(backbone, attribute):
            raise InputError(f"{name}: has no {attribute}; expected {meaning}")
        value, whole = getattr(backbone, attribute), attribute not in ("sample_shape", "condition")
        if whole and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: {attribute} {value!r:.60}; expected {meaning}")
    shape = backbone.sample_shape
    if not (isinstance(shape, tuple) and len(shape) in (3, 4) and all(isinstance(n, int) and n > 0 for n in shape)):
        raise InputError(f"{name}: sample_shape {shape!r:.60}; expected {_ATTRIBUTES['sample_shape']}")
    if not all(hasattr(backbone.condition, part) for part in ("guided", "null", "of", "in_turn", "example")):
        found = type(backbone.condition).__name__
        raise InputError(f"{name}: condition is a {found}; expected {_ATTRIBUTES['condition']}")


class _DryRun:
    """One call of two rows: an example, and the null condition if the model is guided."""

    def __init__(self, backbone: Backbone, name: str, process: Process) -> None:
        self.backbone, self.name, self.process = backbone, name, process
        self.shape = (2, backbone.out_channels, *backbone.sample_shape[1:])

    def run(self) -> None:
        """Raise InputError at the first step that fails, or that gives another shape than the attributes say."""
        backbone = self.backbone
        like = next(backbone.parameters(), torch.zeros(()))
        on_gpu = [like.device] if like.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=on_gpu):
            inputs = self._inputs(like)
            state = self._state("embed", inputs, inputs.x, inputs.t, inputs.y)
            state = self._state("block", inputs, 0, state)
            own = self._prediction("head", state)
            head = self._called("new_exit_head")
            if not isinstance(head, nn.Module):
                raise self._wrong("new_exit_head", _kind(head), "a module, a copy of the final layer")
            shared = {p.data_ptr() for p in backbone.parameters()} & {p.data_ptr() for p in head.parameters()}
            if shared - {0}:
                raise self._wrong("new_exit_head", "the model's own layer", "a copy of it, such as copy.deepcopy makes")
            try:
                patches = head(*state.for_head())
            except Exception as error:
                takes = "a module that is called with (tokens, cond)"
                raise self._wrong("new_exit_head", f"one that fails ({_said(error)})", takes) from error
            exit_ = self._prediction("unpatchify", patches, state)
            if not torch.allclose(exit_, own, rtol=1e-3, atol=1e-3):
                difference = (exit_ - own).abs().max().item()
                _log.warning("%s: a new exit head differs from head() by up to %.2g", self.name, difference)

    def _inputs(self, like: Tensor) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        given = self.backbone.example(1, generator)
        second = replace(given, y=self.backbone.condition.null(given.y)) if self.backbone.condition.guided else given
        times = self.process.sample_timesteps(2, generator)
        return replace(Inputs.joined([given, second]), t=times).to(like)

    def _called(self, method: str, *arguments: object, given: str = "") -> object:
        try:
            return getattr(self.backbone, method)(*arguments)
        except Exception as error:  # the user's own code may raise anything
            raise InputError(f"{self.name}.{method}: {_said(error)}{given}") from error

    def _state(self, method: str, inputs: Inputs, *arguments: object) -> State:
        labels = "" if isinstance(inputs.y, Conditioning) else f" {inputs.y.tolist()}, the last for the null condition"
        given = f"; called for x {tuple(inputs.x.shape)}, t {tuple(inputs.t.shape)} {inputs.t.dtype}, y{labels:.80}"
        state = self._called(method, *arguments, given=given)
        if not isinstance(state, State):
            raise self._wrong(method, _kind(state), "a dyndit.State of tokens (B, N, D) and cond (B, D)")
        tokens, cond = state.for_head()
        wide, beside = self.backbone.width, self.backbone.cond_width
        if tokens.ndim != 3 or len(tokens) != 2 or tokens.shape[2] != wide:
            raise self._wrong(method, f"tokens {tuple(tokens.shape)}", f"(2, N, {wide}): B, N tokens, and width")
        if cond.ndim not in (2, 3) or len(cond) != 2 or cond.shape[-1] != beside:
            raise self._wrong(method, f"cond {tuple(cond.shape)}", f"(2, {beside}): B, and width (or cond_width)")
        return state

    def _prediction(self, method: str, *arguments: object) -> Tensor:
        found = self._called(method, *arguments)
        if not isinstance(found, Tensor) or tuple(found.shape) != self.shape:
            made = f"a prediction {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(found)
            raise self._wrong(method, made, f"{self.shape}, as out_channels and sample_shape say")
        return found

    def _wrong(self, method: str, found: str, expected: str) -> InputError:
        return InputError(f"{self.name}.{method}: returned {found}; expected {expected}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}, {first_line(error)}"
