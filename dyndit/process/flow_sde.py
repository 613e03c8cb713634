"""The SDE sampler of SiT for rectified flows, as a scheduler of diffusers (Ma et al. 2024, arXiv:2401.08740).

With the share of noise s, the velocity v and the noise that it implies, eps = x + (1 - s) v, the score is -eps / s. The
reverse SDE with diffusion coefficient w = norm * s has the marginals of the ODE. A step of length h goes

    x <- x - h (v + norm / 2 * eps) + sqrt(norm * s * h) z

The last step goes to s = 0 and adds no noise. As in SiT's code it begins at s = 0.04, or at 1 / K with fewer steps K.
"""

from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class FlowSDEScheduler(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama steps of SiT's reverse SDE.

    shift: time shift, as in `FlowMatchEulerDiscreteScheduler`. norm: scale of the diffusion coefficient; 0 is the ODE.
    last: share of noise at which the last step begins.
    """

    order = 1

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, norm: float = 1.0, last: float = 0.04
    ) -> None:
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set the shares of noise: even from 1 to `last`, then shifted."""
        settings: Any = self.config
        shares = np.linspace(1, max(settings.last, 1 / num_inference_steps), num_inference_steps)
        shares = settings.shift * shares / (1 + (settings.shift - 1) * shares)
        self.sigmas = torch.tensor([*shares, 0.0], dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * settings.num_train_timesteps).to(device)
        self.num_inference_steps, self._step = num_inference_steps, 0

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        """Return the state itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Take one step from `sample` with the velocity `model_output`.  both: (B, ...) -> (the next state,)."""
        settings: Any = self.config
        here, there = self.sigmas[self._step : self._step + 2].tolist()
        self._step += 1
        x, norm, length = sample.float(), settings.norm, here - there
        eps = x + (1 - here) * model_output
        x = x - length * (model_output + norm / 2 * eps)
        if there > 0 and norm > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + (norm * here * length) ** 0.5 * noise
        return (x.to(model_output.dtype),)
