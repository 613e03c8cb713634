"""The process: how noise and picture mix, and the quantity that a network predicts from the mixture.

Symbols, in every process: x_0 is the picture, eps is standard normal noise, x_t is their mixture at timestep t.
Timesteps rise from 0, the picture, to `num_timesteps`, the noise. A solver runs in the opposite direction.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Process(ABC):
    """A process, held by its model. Subclasses are frozen dataclasses whose fields are plain numbers and words."""

    name: ClassVar[str]
    """Name of the process in files and on the command line."""
    usual_solver: ClassVar[str]
    """Name of the default solver in `dyndit.sampling.solvers.SOLVERS`."""
    has_variance: ClassVar[bool]
    """True if a network may predict a variance in a second half of its channels."""
    num_timesteps: ClassVar[int] = 1000

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and getattr(self, f.name) != f.default}
        return " ".join([self.name, *(f"{name}={value}" for name, value in values.items())])

    def config(self) -> dict[str, Any]:
        """Return plain data from which `dyndit.process.from_config` builds the same process."""
        return {"name": self.name} | {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @abstractmethod
    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mix picture and noise to x_t.  x_0, eps: (B, C, H, W), t: (B,) -> (B, C, H, W)."""

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the quantity that the network should predict from x_t.  -> (B, C, H, W)."""

    @abstractmethod
    def x_0_of(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the picture that a prediction implies.  prediction: (B, C_out, H, W) -> (B, C, H, W)."""

    @abstractmethod
    def clamp(self, prediction: Tensor, x_t: Tensor, timestep: float, channels: int) -> Tensor:
        """Clamp the picture that a prediction implies to [-1, 1], and return the prediction of the clamped picture.

        prediction: (B, C_out, H, W); the first `channels` are clamped. timestep: a plain float, so that no device has
        to be waited for.
        """

    @abstractmethod
    def noise_level(self, t: float) -> float:
        """Return the noise's standard deviation at picture scale 1. It is finite and above 0 at any t."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return the log of the signal-to-noise ratio (of variances) at these timesteps.  -> float64, on the host."""

    def log_snr_at(self, timestep: float) -> float:
        """Return `log_snr` at one timestep, which need not be whole."""
        return -2 * math.log(self.noise_level(float(timestep)))

    @abstractmethod
    def path_kl_weights(self) -> Tensor:
        """Return the weight of a squared prediction error at each whole timestep in the KL between two paths.

        The integrand is 1/2 |dlambda/dt| ||d eps||^2 with the log-SNR lambda (Kingma et al. 2021, arXiv:2107.00630, the
        bound in continuous time). Weights have mean 1.  -> one weight per timestep 0, 1, ...
        """

    @abstractmethod
    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the timesteps of n training pairs, on the host.  -> (n,)."""

    @abstractmethod
    def loss(
        self, prediction: Tensor, x_0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss and its parts for the log.  prediction: (B, C_out, H, W) -> scalar, scalars."""

    @abstractmethod
    def scheduler_settings(self) -> dict[str, Any]:
        """Return the arguments that set a scheduler of diffusers to this process."""

    @abstractmethod
    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a scheduler that steps another process.

        Raises:
            InputError: the scheduler's x_t has another share of noise than the network expects, or the scheduler wants
                another prediction.
        """

    def set_timesteps(self, scheduler: Any, num_steps: int) -> None:
        """Set the timesteps of a scheduler, falling (default: its own spacing)."""
        scheduler.set_timesteps(num_steps)

    def first_state(self, noise: Tensor, scheduler: Any) -> Tensor:
        """Scale standard normal noise to a scheduler's first state (default: its own scale)."""
        return noise * scheduler.init_noise_sigma

    def network_input(self, x: Tensor, t: Tensor, scheduler: Any) -> Tensor:
        """Scale a scheduler's state at its timestep t to x_t (default: its own scale)."""
        return scheduler.scale_model_input(x, t)
