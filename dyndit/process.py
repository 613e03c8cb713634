"""The diffusion objective: noise prediction with a learned variance, on a discrete schedule.

Symbols are those of Ho et al. 2020 (arXiv:2006.11239, "DDPM") and Nichol and Dhariwal 2021 (arXiv:2102.09672,
"iDDPM"): beta_t, alpha_bar_t, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The linear schedule of DDPM: beta from 1e-4 to 0.02 over `num_timesteps` = 1000. Tables are float64."""

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: Tensor = field(init=False, repr=False, compare=False)
    alphas_bar: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = torch.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.float64)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_bar", torch.cumprod(1 - betas, dim=0))

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_bar / (1 - alpha_bar)) at integer t, the lambda of the package (twice diffusers' `lambda_t`)."""
        alpha_bar = self.alphas_bar[t.long().cpu()]
        return torch.log(alpha_bar) - torch.log1p(-alpha_bar)

    def log_snr_at(self, timestep: float) -> float:
        """The same at one timestep, between whole ones too; beyond the schedule its end."""
        return -2 * math.log(self.noise_level(min(float(timestep), self.num_timesteps - 1)))

    def path_kl_weights(self) -> Tensor:
        """What a squared error on the noise weighs at each timestep in the KL between two processes' paths.  -> (T,).

        1/2 |dlambda/dt| ||d eps||^2 is the integrand (Kingma et al. 2021, arXiv:2107.00630, the bound in continuous
        time); the weights are |dlambda/dt| by central differences, scaled to mean 1.
        """
        (change,) = torch.gradient(self.log_snr(torch.arange(self.num_timesteps)))
        return change.abs() / change.abs().mean()

    def noise_level(self, t: float) -> float:
        """sigma = sqrt((1 - alpha_bar) / alpha_bar): the noise's standard deviation where the picture's scale is 1.

        Between whole timesteps it is interpolated linearly, as diffusers' Euler does.
        """
        low = int(t)
        level = ((1 - self.alphas_bar[low]) / self.alphas_bar[low]).sqrt().item()
        return level if low == t else level + (t - low) * (self.noise_level(low + 1) - level)

    def alpha_bar(self, t: float) -> float:
        """alpha_bar at a timestep, by `noise_level` between whole ones."""
        return self.alphas_bar[int(t)].item() if int(t) == t else 1 / (1 + self.noise_level(t) ** 2)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped (B, 1, 1, 1), of `like`'s dtype and device."""
        alpha_bar = self.alphas_bar[t.long().cpu()].view(-1, *[1] * (like.ndim - 1))
        return tuple(scale.to(like.device, like.dtype) for scale in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of DDPM, Equation 4.  x_0, eps: (B, C, H, W), t: (B,) -> (B, C, H, W)."""
        signal, noise = self.scales(t, x_0)
        return signal * x_0 + noise * eps

    def predict_x_0(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The x_0 that a noise prediction implies.  (B, C, H, W), (B, C, H, W), (B,) -> (B, C, H, W)."""
        signal, noise = self.scales(t, x_t)
        return (x_t - noise * eps) / signal

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0): DDPM, Equations 6 and 7.

        The variance is 0 at t = 0; as in iDDPM its logarithm there is taken from t = 1.
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
        """iDDPM, Equation 15: v in [-1, 1] interpolates between the posterior's log-variance and log beta_t."""
        log_beta = self.betas.log()[t.long().cpu()].view(-1, *[1] * (v.ndim - 1)).to(v.device, v.dtype)
        share = (v + 1) / 2
        return share * log_beta + (1 - share) * posterior_log_variance


def gaussian_kl(mean_a: Tensor, log_var_a: Tensor, mean_b: Tensor, log_var_b: Tensor) -> Tensor:
    """KL(a || b) of diagonal Gaussians, elementwise, in nats."""
    ratio = torch.exp(log_var_a - log_var_b) + (mean_a - mean_b) ** 2 * torch.exp(-log_var_b)
    return 0.5 * (ratio - 1 + log_var_b - log_var_a)


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of the mass a Gaussian gives to x's bin of width 2/255 in [-1, 1], elementwise, in nats.

    DDPM, Equation 13: the outermost bins reach to infinity.
    """
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    inverse = torch.exp(-log_std)
    upper = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) * inverse)
    lower = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) * inverse)
    mass = normal.cdf(upper.clamp(-30, 30)) - normal.cdf(lower.clamp(-30, 30))
    return -mass.clamp(min=1e-12).log()


def variational_bound(schedule: Schedule, prediction: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """One term of the variational bound per picture, in bits per dimension.  -> (B,).

    prediction: (B, 2C, H, W). The gradient reaches the variance half alone (iDDPM, Section 3.1).
    """
    eps, v = prediction.chunk(2, dim=1)
    true_mean, true_log_var = schedule.posterior(x_0, x_t, t)
    mean, _ = schedule.posterior(schedule.predict_x_0(x_t, eps.detach(), t), x_t, t)
    log_var = schedule.learned_log_variance(v, t, true_log_var)
    kl = gaussian_kl(true_mean, true_log_var, mean, log_var).flatten(1).mean(1)
    nll = discretised_gaussian_nll(x_0, mean, 0.5 * log_var).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)
