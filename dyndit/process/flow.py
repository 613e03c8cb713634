"""The process of rectified flow: picture and noise are mixed linearly, and the velocity between them is predicted.

x_t = (1 - s) x_0 + s eps with s = t / 1000, velocity eps - x_0 (Liu et al. 2022, arXiv:2209.03003; as in SiT, Ma et al.
2024, arXiv:2401.08740, and Stable Diffusion 3, Esser et al. 2024, arXiv:2403.03206).

Larger pictures need more noise to lose as much. A time shift a maps s to a s / (1 + (a - 1) s), in training and in
sampling; a = sqrt(m / n) for m pixels keeps the uncertainty that n pixels have without a shift (Esser et al.,
Section 5.3.2, Equation 23).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from torch import Tensor

from dyndit.errors import InputError
from dyndit.process.base import Process
from dyndit.process.flow_sde import FlowSDEScheduler

_TAKE_SHARES = FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler
_FLOW_MATCHING = _TAKE_SHARES | FlowMatchHeunDiscreteScheduler | FlowSDEScheduler


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The velocity eps - x_0 is predicted, on the linear interpolant: `dyndit.RectifiedFlow()`. SiT and SD3 follow it.

    Timesteps are real numbers in [0, 1000]. time_shift: shift of the timesteps that training draws and named solvers
    take, see `shift_for`; 1 shifts nothing.
    """

    time_shift: float = 1.0

    name: ClassVar[str] = "flow"
    usual_solver: ClassVar[str] = "flow-euler"
    has_variance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.time_shift, int | float) or not 0 < self.time_shift < float("inf"):
            raise InputError(f"process {self.name}: time_shift {self.time_shift!r:.40}; expected a number above 0")

    @classmethod
    def shift_for(cls, size: tuple[int, int], base: tuple[int, int]) -> float:
        """Return the time shift of pictures of `size` that corresponds to none at `base`, both (height, width)."""
        return math.sqrt(math.prod(size) / math.prod(base))

    def config(self) -> dict[str, Any]:
        """See `Process`. A time shift of 1 is left out: identities of flows without a shift do not name it."""
        return {"name": self.name} | ({} if self.time_shift == 1 else {"time_shift": self.time_shift})

    def _share(self, t: Tensor, like: Tensor) -> Tensor:
        """Return the share of noise s, shaped (B, 1, 1, 1), of `like`'s dtype and device."""
        share = t.double() / self.num_timesteps
        return share.view(-1, *[1] * (like.ndim - 1)).to(like.device, like.dtype)

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return (1 - s) x_0 + s eps.  x_0, eps: (B, C, H, W), t: (B,) -> (B, C, H, W)."""
        share = self._share(t, x_0)
        return (1 - share) * x_0 + share * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the velocity dx/ds."""
        return eps - x_0

    def x_0_of(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return x_t - s v. Channels beyond the velocity's are ignored.  -> (B, C, H, W)."""
        return x_t - self._share(t, x_t) * prediction[:, : x_t.shape[1]]

    def clamp(self, prediction: Tensor, x_t: Tensor, timestep: float, channels: int) -> Tensor:
        """Return the velocity whose x_0 is clamped to [-1, 1]. At s = 0 x_0 is x_t, whatever the velocity."""
        share = timestep / self.num_timesteps
        if share == 0:
            return prediction
        x_0 = (x_t - share * prediction[:, :channels]).clamp(-1, 1)
        return torch.cat([(x_t - x_0) / share, prediction[:, channels:]], dim=1)

    def _inner(self, t: Tensor) -> Tensor:
        """Return s, kept half a timestep away from 0 and 1, because log-SNR is infinite there."""
        return t.double().cpu().clamp(0.5, self.num_timesteps - 0.5) / self.num_timesteps

    def noise_level(self, t: float) -> float:
        """Return s / (1 - s), with s kept half a timestep from 0 and 1."""
        share = self._inner(torch.tensor(t, dtype=torch.float64)).item()
        return share / (1 - share)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return 2 log((1 - s) / s), with s kept half a timestep from 0 and 1."""
        share = self._inner(t)
        return 2 * (torch.log1p(-share) - torch.log(share))

    def path_kl_weights(self) -> Tensor:
        """Take |dlambda/ds| (1 - s)^2: the noise that a velocity implies is x_t + (1 - s) v.  -> (T + 1,)."""
        share = self._inner(torch.arange(self.num_timesteps + 1))
        weights = (1 - share) / share  # |dlambda/ds| = 2 / (s (1 - s))
        return weights / weights.mean()

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw s logit-normal, mean 0 and scale 1: the best density that Stable Diffusion 3 compares.  -> (n,).

        The time shift follows.
        """
        share, a = torch.randn(n, generator=generator).sigmoid(), self.time_shift
        return self.num_timesteps * (share if a == 1 else a * share / (1 + (a - 1) * share))

    def loss(
        self, prediction: Tensor, x_0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the velocity.  -> scalar, {"mse"}."""
        mse = (prediction[:, : x_0.shape[1]].float() - self.target(x_0, eps, t)).square().mean()
        return mse, {"mse": mse.detach()}

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the number of timesteps and the time shift."""
        return {"num_train_timesteps": self.num_timesteps, "shift": self.time_shift}

    def check_scheduler(self, scheduler: Any) -> None:
        """Accept diffusers' flow-matching schedulers, and solvers told to step a flow (`use_flow_sigmas`).

        A scheduler's own time shift is its user's choice. Raises InputError for any other, for another prediction, and
        for another number of timesteps.
        """
        name, config = type(scheduler).__name__, scheduler.config
        if not (isinstance(scheduler, _FLOW_MATCHING) or config.get("use_flow_sigmas")):
            raise InputError(f"scheduler {name}: of another process; expected one of flow matching (rectified flow)")
        wanted = {"prediction_type": "flow_prediction", "num_train_timesteps": self.num_timesteps}
        wanted |= {"variance_type": None}
        for setting, expected in wanted.items():
            if (found := config.get(setting, expected)) != expected:
                raise InputError(f"scheduler {name}: {setting} {found}; expected {expected}")

    def set_timesteps(self, scheduler: Any, num_steps: int) -> None:
        """Set s = 1, 1 - 1/K, ..., 1/K; the scheduler then applies its own shift.

        By default the flow-matching schedulers of diffusers end at s = 1/1000, and their last step moves nothing.
        Pipelines of diffusers pass these values. Heun's scheduler takes its ends alone.
        """
        if isinstance(scheduler, _TAKE_SHARES):
            scheduler.set_timesteps(num_steps, sigmas=np.linspace(1, 0, num_steps + 1)[:-1])  # pyright: ignore[reportArgumentType]  an array is what it makes of it
        elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / num_steps
            scheduler.set_timesteps(num_steps)
        else:
            super().set_timesteps(scheduler, num_steps)

    def first_state(self, noise: Tensor, scheduler: Any) -> Tensor:
        """Return the noise itself."""
        return noise

    def network_input(self, x: Tensor, t: Tensor, scheduler: Any) -> Tensor:
        """Return the state itself."""
        return x
