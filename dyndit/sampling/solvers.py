"""Solvers: diffusers schedulers, by name or as given, and the checks that they step the model's process."""

import functools
import inspect
import itertools
from dataclasses import dataclass

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from dyndit.errors import InputError
from dyndit.process import Schedule

SCHEDULE = Schedule()


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler and its settings.

    Clamping of x0 is done here, in the loop, alike for every solver, so the schedulers' own is off. Spacings give
    the timesteps linspace(999, 0, K + 1)[:-1] or their nearest in the class: no step is spent at t = 0.
    """

    scheduler: type[SchedulerMixin]
    options: dict[str, object]

    def build(self) -> SchedulerMixin:
        """A scheduler on the models' training schedule, its timesteps not set yet."""
        return self.scheduler(
            num_train_timesteps=SCHEDULE.num_timesteps,
            beta_start=SCHEDULE.beta_start,
            beta_end=SCHEDULE.beta_end,
            beta_schedule="linear",
            **self.options,
        )


_MULTISTEP = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}


SOLVERS: dict[str, Solver] = {
    # The published process: spaced timesteps down to t = 0, learned variance (iDDPM).
    "ddpm": Solver(
        diffusers.DDPMScheduler,
        {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"},
    ),
    # DDIM with eta = 0 is DPM-Solver++ of order 1 (Lu et al. 2022, arXiv:2211.01095, Section 4); this class steps
    # exactly between any two timesteps, where DDIMScheduler takes the previous one to be t - 1000 // K.
    "ddim": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 1, **_MULTISTEP}),
    "dpmpp": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "unipc": Solver(diffusers.UniPCMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "euler": Solver(diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
}


AnySolver = str | SchedulerMixin
"""A name of `SOLVERS`, or any noise-predicting diffusers scheduler on the models' training schedule."""


def solver_name(solver: AnySolver) -> str:
    """What plans record: the name in `SOLVERS` of these very settings, else the scheduler's class."""
    if isinstance(solver, str):
        return solver
    mine = (type(solver), _settings(solver))
    named = ((name, (known.scheduler, _settings(_built(name)))) for name, known in SOLVERS.items())
    return next((name for name, theirs in named if theirs == mine), type(solver).__name__)


@functools.cache
def _built(name: str) -> SchedulerMixin:
    return SOLVERS[name].build()


def _settings(scheduler: SchedulerMixin) -> dict[str, object]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def takes_variance(solver: AnySolver) -> bool:
    """Whether `step` wants the learned-variance half of a prediction."""
    scheduler = _built(solver) if isinstance(solver, str) else solver
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def draws_noise(scheduler: SchedulerMixin) -> bool:
    """Whether `step` may draw noise, and wants generators for it.

    Those known to draw none as they are called here (Euler without churn, DDIM with eta = 0, DPM-Solver on the ODE)
    take a generator too; making one per picture and step would be for nothing.
    """
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler | diffusers.DDIMScheduler):
        return False
    if str(scheduler.config.get("algorithm_type", "sde")).startswith("dpmsolver"):
        return False
    return "generator" in _step_parameters(type(scheduler))


@functools.cache
def _step_parameters(scheduler: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(scheduler.step).parameters)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that does not step the process these models predict the noise of.

    Raises:
        InputError: it is no scheduler, runs the network twice a step (Heun, KDPM2), is one of flow matching or of
            another prediction, wants more than a prediction to step, or has other betas than the training schedule:
            its x_t would hold another share of noise than the network takes it to at that timestep.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(f"scheduler {name}: expected a diffusers scheduler")
    if getattr(scheduler, "order", 1) != 1:
        raise InputError(f"scheduler {name}: runs the model {scheduler.order} times a step; expected one of order 1")
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, Tensor) or scheduler.config.get("use_flow_sigmas"):
        raise InputError(f"scheduler {name}: of another process; expected one of noise prediction (DDPM)")
    needed = [
        n for n, p in _step_parameters(type(scheduler)).items() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    if len(needed) != 4:  # self, prediction, timestep, x
        raise InputError(
            f"scheduler {name}: its step needs {', '.join(needed[1:])}; expected a prediction, t and x alone"
        )
    if (found := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
        raise InputError(f"scheduler {name}: prediction_type {found}; expected epsilon")
    if betas.shape != SCHEDULE.betas.shape or not torch.allclose(betas.double().cpu(), SCHEDULE.betas, rtol=1e-4):
        raise InputError(
            f"scheduler {name}: {len(betas)} {scheduler.config.get('beta_schedule', '')} betas from {betas[0]:.3g} to "
            f"{betas[-1]:.3g}; expected the training schedule's {SCHEDULE.num_timesteps} linear ones from "
            f"{SCHEDULE.beta_start:g} to {SCHEDULE.beta_end:g}"
        )


def make_scheduler(solver: AnySolver, num_steps: int) -> SchedulerMixin:
    """A fresh scheduler with its timesteps set; one that is given is left as it is.

    Raises:
        InputError: unknown solver, a scheduler that `check_scheduler` refuses or that repeats timesteps, or a step
            count outside 1..1000.
    """
    if isinstance(solver, str) and solver not in SOLVERS:
        raise InputError(f"--solver {solver}: expected one of {', '.join(SOLVERS)}")
    if not 1 <= num_steps <= SCHEDULE.num_timesteps:
        raise InputError(f"--steps {num_steps}: expected 1 to {SCHEDULE.num_timesteps}")
    if isinstance(solver, str):
        if num_steps == SCHEDULE.num_timesteps and SOLVERS[solver].options.get("final_sigmas_type"):
            raise InputError(
                f"--steps {num_steps}: --solver {solver} has no {num_steps} distinct timesteps; expected less"
            )
        scheduler = SOLVERS[solver].build()
        scheduler.set_timesteps(num_steps)
        return scheduler
    check_scheduler(solver)
    name, scheduler = type(solver).__name__, type(solver).from_config(solver.config)
    try:
        scheduler.set_timesteps(num_steps)
    except ValueError as error:
        raise InputError(f"scheduler {name}: no {num_steps} steps ({str(error).splitlines()[0]})") from error
    times = scheduler.timesteps.tolist()
    if len(times) != num_steps or any(a <= b for a, b in itertools.pairwise(times)):
        found = ", ".join(f"{t:g}" for t in times[:3])
        raise InputError(
            f"scheduler {name}: {len(times)} timesteps ({found}, ...) for {num_steps} steps; expected as many, falling"
        )
    return scheduler


def timesteps_of(solver: AnySolver, num_steps: int) -> tuple[float, ...]:
    """The timesteps of a solver, falling; whole ones are integers."""
    times = make_scheduler(solver, num_steps).timesteps.tolist()
    return tuple(int(t) if float(t).is_integer() else t for t in times)


def log_snr_of(solver: AnySolver, num_steps: int) -> tuple[float, ...]:
    """log(alpha_bar / (1 - alpha_bar)) at every step of a solver, rising from noise to picture."""
    return tuple(SCHEDULE.log_snr(torch.tensor(timesteps_of(solver, num_steps))).tolist())
