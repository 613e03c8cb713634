"""Losses to train a backbone, alone or with its exits, and to distil exits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndit.models.conditions import Condition
from dyndit.models.dynamic import DynamicDepth
from dyndit.process import Process


def denoising_loss(
    model: nn.Module, process: Process, x_0: Tensor, t: Tensor, eps: Tensor, y: Condition
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the process' loss of a model's prediction.  x_0, eps: (B, C, H, W), t, y: (B,) -> scalar, its parts."""
    x_t = process.noised(x_0, eps, t)
    return process.loss(model(x_t, t, y), x_0, eps, x_t, t)


def deep_supervision_loss(
    model: nn.Module, process: Process, x_0: Tensor, t: Tensor, eps: Tensor, y: Condition, exit_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add `exit_weight` times the exits' mean loss to the `denoising_loss` of full depth.

    Deep supervision (Lee et al. 2015, arXiv:1409.5185). model(x_t, t, y): predictions by rising depth, full depth last.
    Figures: the parts of full depth's loss, and "exits".
    """
    x_t = process.noised(x_0, eps, t)
    *shallow, full = model(x_t, t, y)
    loss, figures = process.loss(full, x_0, eps, x_t, t)
    exits = torch.stack([process.loss(each, x_0, eps, x_t, t)[0] for each in shallow]).mean()
    return loss + exit_weight * exits, figures | {"exits": exits.detach()}


def exit_errors(
    model: DynamicDepth, x_t: Tensor, t: Tensor, y: Condition, guides: Sequence[int] = ()
) -> dict[int, Tensor]:
    """Return the squared error of every exit against the full model, per picture and output half.

    guides: exits that are compared with what full depth predicts without the condition.
    -> {depth: (B, 2)}: mean square over the noise channels, and over the variance channels (0 without them).
    """
    predictions = model.every_exit(x_t, t, y)
    target = predictions.pop(model.num_blocks).detach()
    targets: dict[int, Tensor] = dict.fromkeys(predictions, target)
    if guides:
        with torch.no_grad():
            unconditional: Tensor = model(x_t, t, model.backbone.condition.null(y))
        targets |= dict.fromkeys(guides, unconditional)
    return {depth: halves(prediction - targets[depth], x_t.shape[1]) for depth, prediction in predictions.items()}


def depth_errors(model: DynamicDepth, target: Tensor, x_t: Tensor, t: Tensor, y: Condition) -> dict[int, Tensor]:
    """Return `exit_errors` of every depth, full depth last, against a teacher.  target: (B, C_out, H, W)."""
    predictions = model.every_exit(x_t, t, y)
    return {depth: halves(prediction - target, x_t.shape[1]) for depth, prediction in predictions.items()}


def halves(error: Tensor, channels: int) -> Tensor:
    """Return the mean square over the noise channels, and over the variance channels (0 without them).

    error: (B, C_out, H, W) -> (B, 2).
    """
    square = error.float().square()
    noise = square[:, :channels].flatten(1).mean(1)
    variance = square[:, channels:].flatten(1).mean(1) if square.shape[1] > channels else 0 * noise
    return torch.stack([noise, variance], dim=1)
