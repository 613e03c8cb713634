"""Losses: training a trunk, alone or with its exits, and distilling its exits."""

import torch
from torch import Tensor, nn

from dyndit.models.dynamic import DynamicDepth
from dyndit.process import Schedule, variational_bound


def denoising_loss(
    model: nn.Module, schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_simple on the noise plus the variational bound on the variance (iDDPM, Equation 16, one sampled t).

    x_0, eps: (B, C, H, W), t, y: (B,). -> scalar, {"mse", "vb"}. The bound of 1000 terms weighs 0.001, so one
    sampled term weighs 1.
    """
    x_t = schedule.add_noise(x_0, eps, t)
    return _prediction_loss(model(x_t, t, y), schedule, x_0, x_t, t, eps)


def deep_supervision_loss(
    model: nn.Module, schedule: Schedule, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor, exit_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """`denoising_loss` of full depth, plus `exit_weight` times the mean of the exits'.

    Deep supervision (Lee et al. 2015, arXiv:1409.5185). model(x_t, t, y): predictions by rising depth, full depth's
    last. The figures are full depth's, and "exits".
    """
    x_t = schedule.add_noise(x_0, eps, t)
    *shallow, full = model(x_t, t, y)
    loss, figures = _prediction_loss(full, schedule, x_0, x_t, t, eps)
    exits = torch.stack([_prediction_loss(each, schedule, x_0, x_t, t, eps)[0] for each in shallow]).mean()
    return loss + exit_weight * exits, figures | {"exits": exits.detach()}


def _prediction_loss(
    prediction: Tensor, schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`denoising_loss` of a prediction (B, C_out, H, W)."""
    prediction, channels = prediction.float(), x_0.shape[1]
    mse = (prediction[:, :channels] - eps).square().mean()
    if prediction.shape[1] == channels:
        return mse, {"mse": mse.detach()}
    vb = variational_bound(schedule, prediction, x_0, x_t, t).mean()
    return mse + vb, {"mse": mse.detach(), "vb": vb.detach()}


def exit_errors(model: DynamicDepth, x_t: Tensor, t: Tensor, y: Tensor) -> dict[int, Tensor]:
    """Squared error of every exit against the full model, per picture and output half.

    -> {depth: (B, 2)}: mean square over the noise channels, and over the variance channels (0 without them).
    """
    predictions = model.every_exit(x_t, t, y)
    target = predictions.pop(model.num_blocks).detach()
    return _errors(predictions, target, x_t.shape[1])


def depth_errors(model: DynamicDepth, target: Tensor, x_t: Tensor, t: Tensor, y: Tensor) -> dict[int, Tensor]:
    """`exit_errors` of every depth, the full one last, against a teacher's prediction.  target: (B, C_out, H, W)."""
    return _errors(model.every_exit(x_t, t, y), target, x_t.shape[1])


def _errors(predictions: dict[int, Tensor], target: Tensor, channels: int) -> dict[int, Tensor]:
    return {depth: halves(prediction - target, channels) for depth, prediction in predictions.items()}


def halves(error: Tensor, channels: int) -> Tensor:
    """Mean square over the noise channels, and over the variance channels (0 without them).

    error: (B, C_out, H, W) -> (B, 2).
    """
    square = error.float().square()
    noise = square[:, :channels].flatten(1).mean(1)
    variance = square[:, channels:].flatten(1).mean(1) if square.shape[1] > channels else 0 * noise
    return torch.stack([noise, variance], dim=1)
