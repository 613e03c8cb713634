"""DynDiTPipeline: a class-conditional model with exits, as a pipeline of diffusers.

    pipe = DynDiTPipeline.from_model("runs/digits")
    pipe([3, 7], plan="runs/digits/plan.json", seed=0).images
    pipe([3, 7], budget=0.6, num_inference_steps=20).images    # searched on the shift table, the router
    pipe.save_pretrained("pipe")
    diffusers.DiffusionPipeline.from_pretrained("pipe")        # once `from dyndit import DynDiTPipeline` was run
    DynDiTPipeline.from_pretrained("org/name")                 # from the hub

It samples with `dyndit.sampling.loop` and makes the same pictures as `dyndit.sample`. Load it from the hub by its own
class: the base class would fetch neither exits nor shift table, and refuses.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.conditions import ClassLabels
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import guidance_interval as within_interval
from dyndit.plans.table import FILE, ShiftTable
from dyndit.sampling.budget import plan_on_table
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, start, to_uint8
from dyndit.sampling.sample import check_request, resolve_plan
from dyndit.sampling.solvers import named_solver
from dyndit.storage import load as checkpoints
from dyndit.storage.autoencoder import find, open_autoencoder
from dyndit.storage.pretrained import DynamicDepth
from dyndit.training.autoencoders import check_channels, decode_batch

# diffusers looks up in this table how to save and load components that are not its own models.
_COMPONENTS = {ShiftTable.__name__: ["save_pretrained", "from_pretrained"]}
pipeline_loading_utils.LOADABLE_CLASSES[ShiftTable.__module__] = _COMPONENTS
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_COMPONENTS)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CFG_SCALE, NUM_STEPS = 1.5, 20
"""Defaults if neither the call nor its plan nor its table sets a value."""

StepEndCallback = Callable[["DynDiTPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
"""(pipeline, step, timestep, tensors by name) -> tensors that replace them, by name."""


@dataclass(frozen=True)
class _Noise:
    """The source of a call's randomness: `seed`, `seeds` or `generator`; else a seed from torch's own generator."""

    seed: int | None
    first_index: int
    seeds: Sequence[int] | None
    generator: torch.Generator | list[torch.Generator] | None

    def batch(self, labels: list[int], device: torch.device) -> Batch:
        """Return the batch of these labels.

        Raises:
            InputError: several sources, not one seed or generator per picture, or a negative seed.
        """
        given = [name for name in ("seed", "seeds", "generator") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} are both given; expected one source of noise")
        for name in ("seeds", "generator"):
            several = getattr(self, name)
            if isinstance(several, Sequence) and len(several) != len(labels):
                raise InputError(f"{name}: {len(several)} for {len(labels)} pictures; expected one each")
        seeds = [self.seed] if self.seeds is None else list(self.seeds)
        if (least := min([self.first_index, *(seed for seed in seeds if seed is not None)])) < 0:
            raise InputError(f"seed {least}: expected at least 0")
        y = torch.tensor(labels, device=device)
        if self.seeds is not None:
            return Batch(y, (0,) * len(labels), tuple(int(seed) for seed in self.seeds))
        indices = tuple(range(self.first_index, self.first_index + len(labels)))
        seed = int(torch.randint(2**62, ()).item()) if self.seed is None else int(self.seed)
        generators = list(self.generator) if isinstance(self.generator, Sequence) else self.generator
        return Batch(y, indices, seed, generators)


class DynDiTPipeline(DiffusionPipeline):
    """Turn class labels into pictures, at the depths of a plan: a pipeline of diffusers.

        pipe = dyndit.DynDiTPipeline.from_model(model, solver="unipc")
        images = pipe([3, 7], num_inference_steps=20, seed=0).images

    transformer: a `DynamicDepth` over a class-conditional backbone of any number of classes. scheduler: any scheduler
    that steps the model's process (`dyndit.sampling.solvers.check_scheduler`). A scheduler of learned variance gets the
    variance. vae: an autoencoder (`dyndit.training.autoencoders.KINDS`) for models that make latents; without it the
    pipeline returns latents.
    router: the shift table that `budget=` searches.

    Raises:
        InputError: components that do not fit each other.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "router"]  # noqa: RUF012 (the base class' own form)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: DynamicDepth,
        scheduler: Any,
        vae: ModelMixin | None = None,
        router: ShiftTable | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, DynamicDepth):
            raise InputError(f"transformer: {type(transformer).__name__}; expected a dyndit.DynamicDepth")
        backbone = transformer.backbone
        if not isinstance(backbone.condition, ClassLabels):
            raise InputError(f"transformer: a {backbone.family} backbone has no classes; expected a class-conditional")
        if len(backbone.sample_shape) == 4:
            raise InputError("transformer: makes clips; expected a model of pictures (`dyndit.sample` draws clips)")
        if vae is not None and transformer.pixel_space:
            raise InputError("vae: this transformer makes pixels; expected none")
        if vae is not None:
            check_channels(vae, backbone.in_channels)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, router=router)

    @classmethod
    def from_model(
        cls,
        model_or_folder: DynamicDepth | str | Path,
        *,
        solver: str = "",
        vae: ModelMixin | str | Path | None = None,
    ) -> "DynDiTPipeline":
        """Build a pipeline from a model, or from any input of `dyndit.load`. A shift table in its folder is the router.

        solver: a name of `dyndit.sampling.solvers.SOLVERS`; by default the usual one of the model's process. vae: an
        autoencoder, its folder or its hub id (default: the own one of a pipeline's folder).

        Raises:
            InputError: an unknown solver, or a folder that cannot be loaded (CheckpointError).
        """
        if isinstance(model_or_folder, DynamicDepth):
            model, folder = model_or_folder, None
        else:
            loaded = checkpoints.inspect(model_or_folder)
            model, folder = loaded.model, loaded.folder
        table = None if folder is None or not (folder / FILE).exists() else ShiftTable.from_pretrained(folder)
        origin = "" if isinstance(model_or_folder, DynamicDepth) else model_or_folder
        decoder = None if isinstance(vae, str | Path) else vae
        if vae is None and folder is not None and find(origin, optional=True)[0] is not None:
            decoder = open_autoencoder(None, model, origin)
        elif isinstance(vae, str | Path):
            decoder = open_autoencoder(vae, model, "the transformer")
        scheduler = named_solver(solver or model.process.usual_solver, model.process).build(model.process)
        return cls(model, scheduler, decoder, table)

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """Fetch a pipeline from the hub -> its folder.

        The base class fetches only the usual names of weights, so neither the exits nor the shift table.
        """
        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: options[name] for name in known if options.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors"], **options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        plan: DepthPlan | str | Path | None = None,
        budget: float | None = None,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        seed: int | None = None,
        first_index: int = 0,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw one picture per label, all in one batch.

        Depth: full depth by default; or `plan`, a `DepthPlan` or its file; or `budget`, a share of full depth's time
        for which the router searches a plan. Steps and guidance scale default to the plan's values, else to the scale
        of the router's table, else to 20 and 1.5 (1 if the model has no null class).

        guidance_scale: 1 is no guidance. guided_channels: number of guided channels, None for all; the published DiT
        guides 3 of 4. guidance_interval: noise levels (low, high] to guide at, see
        `dyndit.plans.schedules.guidance_interval`.

        Noise: `seed` gives picture i the noise of picture first_index + i of `dyndit.sample`. `seeds` has one seed per
        picture, and gives the noise of picture 0 at that seed. `generator`, one for all or a list with one per picture,
        also draws the noise of a stochastic scheduler. latents: (B, C, H, W), standard normal, replaces the noise.

        output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in 0..1, or "latent", the state at the end.
        callback_on_step_end(pipeline, step, timestep, {"latents": ...}) is called after every step. Latents in its
        returned dictionary replace the state.

        Raises:
            InputError: a label or setting out of range, or a plan that does not fit (PlanError).
        """
        model, labels = self.transformer, _labels(class_labels)
        check_request(model, labels, batch_size=1, seed=0)
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type}: expected one of {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent" and not model.pixel_space and self.vae is None:
            raise InputError(f"output_type {output_type}: this model makes latents and the pipeline has no vae")
        on_step_end = self._on_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        plan = self.plan_for(
            plan=plan, budget=budget, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        guidance = Guidance(plan.cfg_scale, guided_channels)
        if guidance_interval is not None:
            low, high = guidance_interval
            plan = within_interval(plan, low, high, model.process)
        batch = _Noise(seed, first_index, seeds, generator).batch(labels, self._execution_device)
        if latents is not None:
            latents = _checked(latents, (len(labels), *model.backbone.sample_shape), "latents").to(batch.device)

        _to_its_device(model)
        trajectory = start(model, batch, self.scheduler, plan.num_steps, noise=latents)
        bars: Any = self.progress_bar
        with bars(total=plan.num_steps) as bar:

            def step_ended(k: int, t: Tensor, x: Tensor) -> Tensor | None:
                bar.update()
                return None if on_step_end is None else on_step_end(k, t, x)

            x = advance(model, batch, trajectory, plan, guidance, on_step_end=step_ended).x
        images: Any = x.clone() if output_type == "latent" else self._pictures(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def plan_for(
        self,
        *,
        plan: DepthPlan | str | Path | None = None,
        budget: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> DepthPlan:
        """Return the plan that a call with these arguments runs, without its guidance interval.

        A search takes seconds; its plan can serve many calls.

        Raises:
            InputError: plan and budget are both given, there is no router, or a plan does not fit (PlanError).
        """
        if plan is not None and budget is not None:
            raise InputError("plan and budget are both given; expected one of them")
        if budget is not None and self.router is None:
            raise InputError(
                f"budget {budget:g}: this pipeline has no router; expected one with a shift table, or plan="
            )
        plan = DepthPlan.load(Path(plan)) if isinstance(plan, str | Path) else plan
        default_scale = CFG_SCALE if self.transformer.backbone.condition.guided else 1.0
        steps, scale = (NUM_STEPS, default_scale) if plan is None else (plan.num_steps, plan.cfg_scale)
        steps = steps if num_inference_steps is None else num_inference_steps
        if budget is None:
            scale = scale if guidance_scale is None else guidance_scale
            chosen = resolve_plan(self.transformer, plan, self.scheduler, steps, scale)
            return chosen if chosen.cfg_scale == scale else replace(chosen, cfg_scale=scale)
        measured = self.router.cfg_scale
        if guidance_scale not in (None, measured):
            raise InputError(f"guidance_scale {guidance_scale:g}: the router's table was measured at {measured:g}")
        return plan_on_table(self.transformer, self.router, budget=budget, solver=self.scheduler, num_steps=steps)

    def _on_step_end(
        self, callback: StepEndCallback | PipelineCallback | MultiPipelineCallbacks | None, names: Sequence[str]
    ) -> Callable[[int, Tensor, Tensor], Tensor | None] | None:
        """Wrap a callback of diffusers' convention as the sampler's hook."""
        if callback is None:
            return None
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        if unknown := sorted(set(names) - set(self._callback_tensor_inputs)):
            raise InputError(f"callback_on_step_end_tensor_inputs: {unknown[0]}; expected latents alone")

        def on_step_end(k: int, t: Tensor, x: Tensor) -> Tensor | None:
            returned = (callback(self, k, t, {"latents": x} if "latents" in names else {}) or {}).get("latents")
            return None if returned is None else _checked(returned, x.shape, "callback_on_step_end").to(x.device)

        return on_step_end

    def _pictures(self, x: Tensor, output_type: str) -> object:
        """Convert the final state (B, C, H, W) to pictures of type "pil", "np" or "pt"."""
        x = x if self.transformer.pixel_space else decode_batch(self.vae, x)
        if output_type == "pil":
            arrays = to_uint8(x).cpu().permute(0, 2, 3, 1).numpy()
            return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
        x = (x / 2 + 0.5).clamp(0, 1)
        return x if output_type == "pt" else x.cpu().permute(0, 2, 3, 1).numpy()


def _labels(class_labels: int | Sequence[int] | Tensor) -> list[int]:
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.tolist()
    class_labels = [class_labels] if isinstance(class_labels, int) else class_labels
    try:
        return [operator.index(label) for label in class_labels]
    except TypeError as error:
        raise InputError(f"class_labels: {class_labels!r:.60}; expected the numbers of classes") from error


def _checked(x: Tensor, shape: Sequence[int], what: str) -> Tensor:
    """Return the tensor in float32.

    Raises:
        InputError: the tensor has another shape.
    """
    if tuple(x.shape) != tuple(shape):
        raise InputError(f"{what}: latents of shape {tuple(x.shape)}, expected {tuple(shape)}")
    return x.float()


_to_its_device = apply_forward_hook(lambda model: None)
"""Move the model under `enable_model_cpu_offload`. Only a call of `forward` moves it; the loop calls `predict`."""

# `DiffusionPipeline.from_pretrained` looks up the class in model_index.json in the namespace of diffusers. It has no
# entry point for classes of other packages.
diffusers.DynDiTPipeline = DynDiTPipeline  # pyright: ignore[reportAttributeAccessIssue]
