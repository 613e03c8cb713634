"""Build solvers from diffusers schedulers, by name or as given, and check that they step the model's process."""

import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from dyndit.errors import InputError, expected_one_of
from dyndit.process import DDPM, Process, RectifiedFlow
from dyndit.process.flow_sde import FlowSDEScheduler


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler, its settings, and the process that it steps.

    The sampling loop clamps x0 alike for every solver, so the schedulers' own clamping is off. Spacings give the
    timesteps linspace(999, 0, K + 1)[:-1], or the nearest that the class has: no step is spent at t = 0.
    """

    scheduler: type[SchedulerMixin]
    options: dict[str, Any]
    process: type[Process] = DDPM

    def build(self, process: Process | None = None) -> SchedulerMixin:
        """Build the scheduler, its timesteps not set yet.

        process: the model's process, of the class that this solver steps (default: the class's usual settings).
        """
        return self.scheduler(**(process or self.process()).scheduler_settings(), **self.options)


_NO_NOISE = (
    diffusers.EulerDiscreteScheduler,
    diffusers.DDIMScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
)
_MULTISTEP = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}

SOLVERS: dict[str, Solver] = {
    # Published sampling: spaced timesteps down to t = 0, learned variance (iDDPM).
    "ddpm": Solver(
        diffusers.DDPMScheduler,
        {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"},
    ),
    # DDIM with eta = 0 is DPM-Solver++ of order 1 (Lu et al. 2022, arXiv:2211.01095, Section 4); this class steps
    # exactly between any two timesteps, while DDIMScheduler always steps to t - 1000 // K.
    "ddim": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 1, **_MULTISTEP}),
    "dpmpp": Solver(diffusers.DPMSolverMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "unipc": Solver(diffusers.UniPCMultistepScheduler, {"solver_order": 2, **_MULTISTEP}),
    "euler": Solver(diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "flow-euler": Solver(diffusers.FlowMatchEulerDiscreteScheduler, {}, RectifiedFlow),
    "flow-heun": Solver(diffusers.FlowMatchHeunDiscreteScheduler, {}, RectifiedFlow),
    "flow-sde": Solver(FlowSDEScheduler, {}, RectifiedFlow),
}

AnySolver = str | SchedulerMixin
"""A name of `SOLVERS`, or any diffusers scheduler that steps the model's process."""


def solvers_of(process: Process) -> dict[str, Solver]:
    """Return the named solvers that step a process."""
    return {name: solver for name, solver in SOLVERS.items() if isinstance(process, solver.process)}


def named_solver(name: str, process: Process) -> Solver:
    """Look up a solver for a model of this process. Raises InputError if there is none of this name."""
    if name not in SOLVERS:
        raise InputError(f"--solver {name}: {expected_one_of(name, SOLVERS)}")
    if name not in solvers_of(process):
        raise InputError(
            f"--solver {name}: steps the process {SOLVERS[name].process.name}, but this model's is {process.name}; "
            f"expected one of {', '.join(solvers_of(process))}"
        )
    return SOLVERS[name]


def solver_name(solver: AnySolver) -> str:
    """Return the name that plans record: the name in `SOLVERS` of equal settings, else the scheduler's class."""
    if isinstance(solver, str):
        return solver
    mine = (type(solver), _settings(solver))
    named = ((name, (known.scheduler, _settings(_built(name)))) for name, known in SOLVERS.items())
    return next((name for name, theirs in named if theirs == mine), type(solver).__name__)


def scheduler_class(name: str) -> str:
    """Return the class of the scheduler that a plan's solver names."""
    return SOLVERS[name].scheduler.__name__ if name in SOLVERS else name


@functools.cache
def _built(name: str) -> SchedulerMixin:
    return SOLVERS[name].build()


def _settings(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def takes_variance(solver: AnySolver) -> bool:
    """Tell whether `step` takes the learned-variance half of a prediction."""
    scheduler: Any = _built(solver) if isinstance(solver, str) else solver
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def kind_of(solver: str) -> str:
    """Return "SDE" if a named solver adds noise, "ODE" if not, "" for an unknown name."""
    if solver not in SOLVERS:
        return ""
    return "SDE" if draws_noise(SOLVERS[solver].build()) else "ODE"


def draws_noise(scheduler: Any) -> bool:
    """Tell whether `step` may draw noise, and so needs generators.

    Euler and Heun without churn, DDIM with eta = 0 and DPM-Solver on the ODE also take a generator, but draw no noise.
    Making one generator per picture and step for them would be wasted.
    """
    if isinstance(scheduler, _NO_NOISE):
        return False
    settings = scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return bool(settings.stochastic_sampling)
    if str(scheduler.config.get("algorithm_type", "sde")).startswith("dpmsolver"):
        return False
    return "generator" in _step_parameters(type(scheduler))


@functools.cache
def _step_parameters(scheduler: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(scheduler.step).parameters)


def check_scheduler(scheduler: Any, process: Process) -> None:
    """Refuse a scheduler that the sampling loop cannot call, or that steps another process than the model's.

    Raises:
        InputError: it is no scheduler, runs the network twice a step (Heun, KDPM2), needs more than a prediction to
            step, or the process refuses it (`Process.check_scheduler`).
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, SchedulerMixin):
        raise InputError(f"scheduler {name}: expected a diffusers scheduler")
    order = getattr(scheduler, "order", 1)
    if order != 1 and not isinstance(scheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        raise InputError(f"scheduler {name}: runs the model {order} times a step; expected one of order 1")
    needed = [
        n for n, p in _step_parameters(type(scheduler)).items() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    if len(needed) != 4:  # self, prediction, timestep, x
        raise InputError(
            f"scheduler {name}: its step needs {', '.join(needed[1:])}; expected a prediction, t and x alone"
        )
    process.check_scheduler(scheduler)


def calls_of(scheduler: Any) -> list[range]:
    """Return the calls of the network at each timestep, as positions in `scheduler.timesteps`.

    A solver of order 2 (Heun's) calls it once at the first timestep. At every later timestep it calls it twice: to
    correct the step that ends there, and to begin the next step.
    """
    num = len(scheduler.timesteps)
    if getattr(scheduler, "order", 1) == 1:
        return [range(k, k + 1) for k in range(num)]
    return [range(max(0, last - 1), last + 1) for last in range(0, num, 2)]


def _times(scheduler: Any) -> list[float]:
    return scheduler.timesteps[:: getattr(scheduler, "order", 1)].tolist()


def make_scheduler(solver: AnySolver, num_steps: int, process: Process = DDPM()) -> SchedulerMixin:
    """Make a fresh scheduler with its timesteps set. A given scheduler is copied, not changed.

    process: the model's process.

    Raises:
        InputError: the solver is unknown or of another process, `check_scheduler` refuses the scheduler, timesteps
            repeat, or the step count is outside 1..1000.
    """
    named = named_solver(solver, process) if isinstance(solver, str) else None
    if not 1 <= num_steps <= process.num_timesteps:
        raise InputError(f"--steps {num_steps}: expected 1 to {process.num_timesteps}")
    if named is not None:
        if num_steps == process.num_timesteps and named.options.get("final_sigmas_type"):
            raise InputError(
                f"--steps {num_steps}: --solver {solver} has no {num_steps} distinct timesteps; expected less"
            )
        scheduler = named.build(process)
        process.set_timesteps(scheduler, num_steps)
        return scheduler
    given: Any = solver
    check_scheduler(given, process)
    name, scheduler = type(given).__name__, type(given).from_config(given.config)
    try:
        process.set_timesteps(scheduler, num_steps)
    except ValueError as error:
        raise InputError(f"scheduler {name}: no {num_steps} steps ({str(error).splitlines()[0]})") from error
    times = _times(scheduler)
    if len(times) != num_steps or any(a <= b for a, b in itertools.pairwise(times)):
        found = ", ".join(f"{t:g}" for t in times[:3])
        raise InputError(
            f"scheduler {name}: {len(times)} timesteps ({found}, ...) for {num_steps} steps; expected as many, falling"
        )
    return scheduler


def timesteps_of(solver: AnySolver, num_steps: int, process: Process = DDPM()) -> tuple[float, ...]:
    """Return the timesteps of a solver, falling, each once. Whole timesteps are integers."""
    times = _times(make_scheduler(solver, num_steps, process))
    return tuple(int(t) if float(t).is_integer() else t for t in times)
