"""The process of DDPM: the network predicts noise, and may predict a variance, on a discrete schedule of variances.

Symbols follow Ho et al. 2020 (arXiv:2006.11239, "DDPM") and Nichol and Dhariwal 2021 (arXiv:2102.09672, "iDDPM"):
beta_t, alpha_bar_t, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.process.base import Process


@dataclass(frozen=True)
class DDPM(Process):
    """Noise is predicted, on DDPM's schedule: `dyndit.DDPM()`. The published DiT follows it.

    beta_start, beta_end: beta rises linearly between them over 1000 timesteps. Tables are float64.
    """

    name: ClassVar[str] = "ddpm"
    usual_solver: ClassVar[str] = "ddim"
    has_variance: ClassVar[bool] = True
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: Tensor = field(init=False, repr=False, compare=False)
    alphas_bar: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                f"process ddpm: betas {self.beta_start} to {self.beta_end}; expected within (0, 1), rising"
            )
        # Make the tables now: tables first made in inference mode could not be used in training.
        betas = torch.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.float64)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_bar", torch.cumprod(1 - betas, dim=0))

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha_bar / (1 - alpha_bar)) at integer t: twice diffusers' `lambda_t`."""
        alpha_bar = self.alphas_bar[t.long().cpu()]
        return torch.log(alpha_bar) - torch.log1p(-alpha_bar)

    def path_kl_weights(self) -> Tensor:
        """Return |dlambda/dt| by central differences, scaled to mean 1.  -> (T,)."""
        (change,) = torch.gradient(self.log_snr(torch.arange(self.num_timesteps)))
        return change.abs() / change.abs().mean()

    def noise_level(self, t: float) -> float:
        """Return sigma = sqrt((1 - alpha_bar) / alpha_bar), the noise's standard deviation at picture scale 1.

        Between whole timesteps sigma is interpolated linearly, as in diffusers' Euler. Beyond the last timestep it
        stays constant.
        """
        t = min(t, self.num_timesteps - 1)
        low = int(t)
        level = ((1 - self.alphas_bar[low]) / self.alphas_bar[low]).sqrt().item()
        return level if low == t else level + (t - low) * (self.noise_level(low + 1) - level)

    def alpha_bar(self, t: float) -> float:
        """Return alpha_bar at a timestep. Between whole timesteps it follows from `noise_level`."""
        return self.alphas_bar[int(t)].item() if int(t) == t else 1 / (1 + self.noise_level(t) ** 2)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (B, 1, 1, 1), in `like`'s dtype and on its device."""
        alpha_bar = self.alphas_bar[t.long().cpu()].view(-1, *[1] * (like.ndim - 1))
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return signal.to(like.device, like.dtype), noise.to(like.device, like.dtype)

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mix to x_t by DDPM, Equation 4.  x_0, eps: (B, C, H, W), t: (B,) -> (B, C, H, W)."""
        signal, noise = self.scales(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the noise."""
        return eps

    def x_0_of(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the x_0 that a noise prediction implies. A variance half is ignored.  -> (B, C, H, W)."""
        signal, noise = self.scales(t, x_t)
        return (x_t - noise * prediction[:, : x_t.shape[1]]) / signal

    def clamp(self, prediction: Tensor, x_t: Tensor, timestep: float, channels: int) -> Tensor:
        """Clamp the implied x_0 to [-1, 1] and return its noise prediction. The variance half does not change."""
        eps, alpha_bar = prediction[:, :channels], self.alpha_bar(timestep)
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_0 = ((x_t - sigma * eps) / signal).clamp(-1, 1)
        return torch.cat([(x_t - signal * x_0) / sigma, prediction[:, channels:]], dim=1)

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw whole timesteps uniformly."""
        return torch.randint(self.num_timesteps, (n,), generator=generator)

    def loss(
        self, prediction: Tensor, x_0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add L_simple on the noise and the variational bound on the variance (iDDPM, Equation 16, one sampled t).

        -> scalar, {"mse", "vb"}; without "vb" if no variance is predicted. The bound of 1000 terms weighs 0.001, so
        one sampled term weighs 1.
        """
        prediction, channels = prediction.float(), x_0.shape[1]
        mse = (prediction[:, :channels] - eps).square().mean()
        if prediction.shape[1] == channels:
            return mse, {"mse": mse.detach()}
        vb = variational_bound(self, prediction, x_0, x_t, t).mean()
        return mse + vb, {"mse": mse.detach(), "vb": vb.detach()}

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the betas."""
        betas = {"beta_start": self.beta_start, "beta_end": self.beta_end, "beta_schedule": "linear"}
        return {"num_train_timesteps": self.num_timesteps} | betas

    def check_scheduler(self, scheduler: Any) -> None:
        """Accept a scheduler that predicts noise on these betas. Raise InputError for any other."""
        name, betas = type(scheduler).__name__, getattr(scheduler, "betas", None)
        if not isinstance(betas, Tensor) or scheduler.config.get("use_flow_sigmas"):
            raise InputError(f"scheduler {name}: of another process; expected one of noise prediction (DDPM)")
        if (found := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
            raise InputError(f"scheduler {name}: prediction_type {found}; expected epsilon")
        if betas.shape != self.betas.shape or not torch.allclose(betas.double().cpu(), self.betas, rtol=1e-4):
            raise InputError(
                f"scheduler {name}: {len(betas)} {scheduler.config.get('beta_schedule', '')} betas from "
                f"{betas[0]:.3g} to {betas[-1]:.3g}; expected the training schedule's {self.num_timesteps} linear ones "
                f"from {self.beta_start:g} to {self.beta_end:g}"
            )

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and log-variance of q(x_{t-1} | x_t, x_0): DDPM, Equations 6 and 7.

        The variance is 0 at t = 0. As in iDDPM, its logarithm at t = 0 is taken from t = 1.
        """
        index = t.long().cpu()
        bar = self.alphas_bar
        bar_before = torch.cat([bar.new_ones(1), bar[:-1]])
        betas, shape = self.betas, (-1, *[1] * (x_t.ndim - 1))
        variance = betas * (1 - bar_before) / (1 - bar)
        coefficients = (
            betas * bar_before.sqrt() / (1 - bar),
            (1 - bar_before) * (1 - betas).sqrt() / (1 - bar),
            torch.cat([variance[1:2], variance[1:]]).log(),
        )
        c_0, c_t, log_variance = (c[index].view(shape).to(x_t.device, x_t.dtype) for c in coefficients)
        return c_0 * x_0 + c_t * x_t, log_variance

    def learned_log_variance(self, v: Tensor, t: Tensor, posterior_log_variance: Tensor) -> Tensor:
        """Interpolate by v in [-1, 1] between the posterior's log-variance and log beta_t (iDDPM, Equation 15)."""
        log_beta = self.betas.log()[t.long().cpu()].view(-1, *[1] * (v.ndim - 1)).to(v.device, v.dtype)
        share = (v + 1) / 2
        return share * log_beta + (1 - share) * posterior_log_variance


def gaussian_kl(mean_a: Tensor, log_var_a: Tensor, mean_b: Tensor, log_var_b: Tensor) -> Tensor:
    """Return KL(a || b) of diagonal Gaussians, elementwise, in nats."""
    ratio = torch.exp(log_var_a - log_var_b) + (mean_a - mean_b) ** 2 * torch.exp(-log_var_b)
    return 0.5 * (ratio - 1 + log_var_b - log_var_a)


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return -log of a Gaussian's mass in x's bin of width 2/255 in [-1, 1], elementwise, in nats.

    DDPM, Equation 13: the outermost bins reach to infinity.
    """
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    inverse = torch.exp(-log_std)
    upper = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) * inverse)
    lower = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) * inverse)
    mass = normal.cdf(upper.clamp(-30, 30)) - normal.cdf(lower.clamp(-30, 30))
    return -mass.clamp(min=1e-12).log()


def variational_bound(process: DDPM, prediction: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return one term of the variational bound per picture, in bits per dimension.  -> (B,).

    prediction: (B, 2C, H, W). The gradient reaches only the variance half (iDDPM, Section 3.1).
    """
    eps, v = prediction.chunk(2, dim=1)
    true_mean, true_log_var = process.posterior(x_0, x_t, t)
    mean, _ = process.posterior(process.x_0_of(x_t, eps.detach(), t), x_t, t)
    log_var = process.learned_log_variance(v, t, true_log_var)
    kl = gaussian_kl(true_mean, true_log_var, mean, log_var).flatten(1).mean(1)
    nll = discretised_gaussian_nll(x_0, mean, 0.5 * log_var).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)
