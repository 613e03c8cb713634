"""An unmodified pipeline of diffusers behind the page. The plug-in runs its plans.

A pipeline runs from its first step to its last, so the sides are drawn one after the other, from the same generators.
The input of a transformer call is the state after the step before: it is decoded and shown, if the pipeline's
autoencoder can decode it on its own. Other families show their pictures at the end.
"""

import inspect
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from dyndit.demo.planner import Planner
from dyndit.demo.studio import Form, Request, Side, Studio
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.pictures import as_nchw
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import skips
from dyndit.plans.table import ShiftTable
from dyndit.plugin.apply import DynDiTHandle, apply_dyndit
from dyndit.plugin.call_plan import SOME_SCALE
from dyndit.plugin.experts import own_timesteps, transformers_in
from dyndit.plugin.hooks import watching
from dyndit.sampling.loop import picture_generator, to_uint8
from dyndit.sampling.solvers import solver_name
from dyndit.training.autoencoders import KINDS, decode_batch, latent_space

HOOK = "dyndit_demo"
FRAMES = ("num_frames", "video_length")
"""Names of a pipeline's argument for the length of a clip."""
SOLVERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Schedulers that may take the place of a pipeline's own. They start from noise of deviation 1, as pipelines assume."""
PROMPTS = ("a red apple on a wooden table",)


class _Left(Exception):
    """The visitor has left, or enough is known."""


class PipelineStudio(Studio):
    """A pipeline of one transformer that an adapter serves.

    exits: a module, `exits.safetensors` or its folder; None: untrained exits. table: made by `calibrate_pipeline`.
    shape: (height, width) of pictures, or (frames, height, width); () is the pipeline's own.

    Raises:
        InputError: it takes neither classes nor a prompt, has two transformers, or no adapter serves it; or exits and
            table do not fit.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        exits: Exits | Path | None = None,
        table: ShiftTable | None = None,
        *,
        name: str = "pipeline",
        shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.pipe, self.name, kind = pipe, name, type(pipe).__name__
        pipe.set_progress_bar_config(disable=True)
        self._takes = inspect.signature(type(pipe).__call__).parameters
        if not {"class_labels", "prompt"} & set(self._takes) or "image" in _needed(self._takes):
            raise InputError(
                f"{name}: a {kind}; expected a pipeline that draws from class labels or from a prompt alone"
            )
        if len(transformers_in(pipe)) > 1:
            raise InputError(f"{name}: a {kind} of two transformers; expected one")
        self._size = self._sized(shape)
        self._handle: DynDiTHandle = apply_dyndit(
            pipe, ExitConfig(head="adaln-linear") if exits is None else exits, skips
        )
        if table is not None:
            self._handle.model.check_identity(table.backbone, table.exits, origin=f"{name}: shift table")
        self._schedulers = _schedulers(pipe)
        self._warm: set[int] = set()
        self._known: dict[tuple[object, ...], tuple[tuple[float, ...], bool]] = {}
        scales = [each for each in ("true_cfg_scale", "guidance_scale") if each in self._takes]
        self._scale = scales[0] if scales else None
        self.planner = Planner(self._handle.model.depths, table, trained=exits is not None, lock=self._lock)
        self.form = self._form(table)
        if not self._shows_steps():
            self.about = f"A {kind} shows its pictures at the end: its states cannot be decoded by themselves."

    def _sized(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Return the arguments of a size. Raises InputError: the pipeline takes no such size."""
        names = (*(each for each in FRAMES if each in self._takes), "height", "width")[-len(shape) :] if shape else ()
        if len(names) != len(shape) or not set(names) <= set(self._takes):
            kind = type(self.pipe).__name__
            raise InputError(
                f"--shape {' '.join(map(str, shape))}: {kind} takes no such size; expected none, or another"
            )
        return dict(zip(names, shape, strict=True))

    def _form(self, table: ShiftTable | None) -> Form:
        labels: tuple[tuple[str, int], ...] = ()
        if "class_labels" in self._takes:
            named = {label: name for name, label in sorted(getattr(self.pipe, "labels", {}).items(), reverse=True)}
            number = self.pipe.transformer.config.num_embeds_ada_norm
            labels = tuple((named.get(label, str(label)), label) for label in range(number))
        most = 2 if set(FRAMES) & set(self._takes) else 4
        usual = 1.0 if self._scale is None else float(self._takes[self._scale].default or 1.0)
        return Form(
            first=tuple(label for _, label in labels[:2]) or PROMPTS,
            labels=labels,
            solvers=tuple(self._schedulers),
            guided=self._scale is not None,
            scale=usual if table is None or self._scale is None else table.cfg_scale,
            most_pictures=most,
        )

    def full(self, request: Request) -> DepthPlan:
        """See `Studio`. The first request of its kind starts the pipeline, to see its timesteps and its guidance."""
        self.check(request)
        timesteps, guided = self._seen(request)
        scale = (request.cfg_scale if self._scale else self._usual_scale) if guided else 1.0
        solver = solver_name(self._schedulers[request.solver])
        return DepthPlan.full(timesteps, self._handle.model.num_blocks, solver, scale)

    @property
    def _usual_scale(self) -> float:
        """Return the scale of guided calls of a pipeline that takes none."""
        return SOME_SCALE if self.planner.table is None else self.planner.table.cfg_scale

    def draw(self, request: Request) -> Iterator[tuple[Side, Side | None]]:
        """See `Studio`. The plan's side follows full depth's, whose steps are shown again beside it."""
        full, plan = self.full(request), self.plan(request)
        with self._lock:
            self._warm_up(request)
            left = []
            with closing(self._steps(request, full, None)) as steps:
                for side in steps:
                    left.append(side)
                    yield side, None
            with closing(self._steps(request, plan, plan)) as steps:
                for before, side in zip(left, steps, strict=True):
                    yield before, side

    def _warm_up(self, request: Request) -> None:
        """Run the first step of a call, untimed, if none of so many pictures has run: a first call costs more."""

        def step_ended(step: int, _x: Tensor) -> None:
            if step:
                raise _Left

        if (count := len(request.values)) not in self._warm:
            self._handle.plan = None
            with suppress(_Left):
                self._call(request, step_ended)
            self._warm.add(count)

    def _steps(self, request: Request, shown: DepthPlan, run: DepthPlan | None) -> Generator[Side]:
        """Run the pipeline in a thread of its own, and yield each step as it ends.  run: None is full depth."""
        news: queue.Queue[Side | Exception | None] = queue.Queue()
        gone = threading.Event()
        count = len(request.values)

        def seconds() -> float:
            return float(np.asarray(self._handle.stats()["seconds"]).sum())

        def step_ended(step: int, x: Tensor) -> None:
            if gone.is_set():
                raise _Left
            if step:
                news.put(Side(shown, step, self._decoded(x, count), seconds()))

        def work() -> None:
            try:
                self._handle.plan = run
                pictures = self._call(request, step_ended)
                news.put(Side(shown, shown.num_steps, pictures, seconds()))
            except _Left:
                pass
            except Exception as error:
                news.put(error)
            finally:
                news.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (item := news.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            gone.set()
            thread.join()

    def _call(self, request: Request, step_ended: Callable[[int, Tensor], None]) -> Tensor:
        """Run the pipeline -> uint8 pictures or clips.

        step_ended(number of steps done, state) is called before every step's first transformer call.
        """
        self.pipe.scheduler = self._schedulers[request.solver]
        count, values = len(request.values), list(request.values)
        arguments: dict[str, object] = {
            "num_inference_steps": request.steps,
            "generator": [picture_generator(request.seed, index) for index in range(count)],
            "output_type": "np",
            "return_dict": False,
            "class_labels" if self.form.labels else "prompt": values,
            **self._size,
        }
        if self._scale is not None:
            arguments[self._scale] = request.cfg_scale
        if self._scale == "true_cfg_scale":
            arguments["negative_prompt"] = [""] * count
        times: list[float] = []

        def called(*args: object, **kwargs: object) -> None:
            inputs = self._handle.adapter.read(*args, **kwargs)
            timestep = float(inputs.t[0])
            if not times or times[-1] != timestep:
                times.append(timestep)
                step_ended(len(times) - 1, inputs.x)

        call = cast("Callable[..., tuple[object, ...]]", self.pipe)  # the base class has no call of its own
        with watching(self.pipe.transformer, HOOK, called):
            made = np.asarray(call(**arguments)[0], dtype=np.float32)
        return as_nchw((255 * made + 0.5).clip(0, 255).astype(np.uint8))

    def _seen(self, request: Request) -> tuple[tuple[float, ...], bool]:
        """Return the timesteps of such a call, and if it runs two branches. The call is left at its second step."""
        key = (request.solver, request.steps, request.cfg_scale > 1)
        if key in self._known:
            return self._known[key]
        adapter, calls = self._handle.adapter, []

        def called(*args: object, **kwargs: object) -> None:
            calls.append(adapter.read(*args, **kwargs))
            if adapter.guidance != "calls" or len(calls) == 2:
                raise _Left

        one = replace(request, values=request.values[:1])
        with self._lock, suppress(_Left), watching(self.pipe.transformer, f"{HOOK}_seen", called):
            self._handle.plan = None
            self._call(one, lambda _step, _x: None)
        timesteps = dict.fromkeys(own_timesteps(self.pipe, self.pipe.transformer).tolist())
        if adapter.guidance == "calls":
            guided = len(calls) == 2 and float(calls[0].t[0]) == float(calls[1].t[0])
        else:
            guided = len(calls[0]) == 2
        self._known[key] = (tuple(timesteps), guided)
        return self._known[key]

    def _shows_steps(self) -> bool:
        vae = getattr(self.pipe, "vae", None)
        return type(vae).__name__ in KINDS and len(self._handle.adapter.sample_shape) in (3, 4)

    @torch.no_grad()
    def _decoded(self, x: Tensor, count: int) -> Tensor | None:
        """Decode the state of `count` pictures, (B, C, h, w) or (B, C, T, h, w), both branches or one."""
        vae = self.pipe.vae
        if not self._shows_steps() or x.ndim not in (4, 5) or x.shape[1] != latent_space(vae).channels:
            return None
        x = x[:count].to(vae.device)
        frames = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        pictures = to_uint8(decode_batch(vae, frames)).cpu()
        return pictures.unflatten(0, (count, -1)).transpose(1, 2) if x.ndim == 5 else pictures


def _needed(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the names of arguments without a default."""
    return [name for name, parameter in parameters.items() if parameter.default is parameter.empty]


def _schedulers(pipe: DiffusionPipeline) -> dict[str, SchedulerMixin]:
    """Return the pipeline's own scheduler, first, and others of the same settings that may take its place."""
    own = pipe.scheduler
    found = {type(own).__name__: own}
    if (
        "FlowMatch" in type(own).__name__
        or own.config.get("use_flow_sigmas")
        or not getattr(own, "has_compatibles", False)
    ):
        return found
    for name in SOLVERS:
        kind = getattr(diffusers, name)
        if name not in found and kind in own.compatibles:
            other = kind.from_config(own.config)
            if not str(other.config.get("variance_type")).startswith("learned"):
                found[name] = other
    return found
