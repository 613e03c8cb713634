"""Time plans against each other: paired, alternating, warmed up, in one process; in our sampler or in a pipeline.

`measure` gives a row per timed call (`COLUMNS`); `bench_verdict` sums them up, `bench_check` tests the timing itself.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from diffusers import AutoencoderKL, DiTPipeline, ModelMixin

from dyndit import manifest
from dyndit.analysis.metrics.energy import EnergyMeter, energy_meter
from dyndit.analysis.metrics.macs import model_macs
from dyndit.analysis.metrics.memory import MEANING, peak_memory
from dyndit.clock import Clock
from dyndit.errors import InputError, expected_one_of
from dyndit.models.dit import CARDS, ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth, compile_parts
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import DepthPlan
from dyndit.plugin.adapters import adapt
from dyndit.plugin.apply import apply_dyndit, remove_dyndit
from dyndit.process import DDPM
from dyndit.progress import tracked
from dyndit.rounds import Reading, Repeats, paired_rounds
from dyndit.sampling.loop import picture_generator
from dyndit.sampling.sample import Samples, sample
from dyndit.sampling.solvers import make_scheduler
from dyndit.sampling.timing import measure_cost
from dyndit.storage.autoencoder import open_autoencoder
from dyndit.storage.diffusers_folder import to_diffusers
from dyndit.training.autoencoders import decode_latents, latent_space

RANDOM = "random:"
"""Prefix of a card's name: a model of random weights, which is enough to measure times."""

RANDOM_DECODER = "random:f8"
"""In place of an autoencoder's folder: random weights in the shape of Stable Diffusion's autoencoder, 8 px a latent."""

FULL, AGAIN, NO_PLUGIN = "full", "full again", "no plug-in"

DENOISER, DECODER, PIPELINE = "denoiser", "decoder", "pipeline call"
TO_LATENTS, TO_UINT8 = "noise to latents", "noise to uint8"

PIPELINE_CLASSES = 1000
"""Number of classes in every `DiTPipeline`: it takes label 1,000 for the null label, whatever the model."""

COLUMNS: dict[str, str] = {
    "model": "the model, as it was asked for",
    "machine": "GPU, or CPU with its threads and cores; times of two machines are never averaged",
    "device": "cpu or cuda",
    "dtype": "precision of the weights the denoiser computes in",
    "threads": "threads of torch on the CPU",
    "compiled": "eager, or compiled: every block and exit head by itself, for all arms alike",
    "solver": "solver",
    "steps": "sampling steps",
    "cfg_scale": "guidance scale",
    "batch_size": "pictures per call",
    "round": "each round runs every arm once, in an order that changes",
    "arm": "full; full again (the same, an A/A null); no plug-in (diffusers' pipeline as it is); or who wrote the plan",
    "scope": "denoiser: all calls of the network; decoder: latents to uint8; noise to latents; noise to uint8: end to "
    "end, decoder included; pipeline call: a whole call of DiTPipeline",
    "seconds": "of one call in this scope, for the whole batch; denoiser has a call of its own, waiting at each step",
    "joules": "of the whole device during the call, in the widest scope; empty without a meter",
    "energy_source": "NVML (the GPU) or RAPL (the CPU packages); empty without a meter",
    "predicted_seconds": "what the plan and the measured times of the model's parts promise for this scope",
    "share_of_blocks": "transformer blocks the plan runs, over those of full depth at the same steps",
    "macs": "multiply-accumulates of the denoiser for one picture, whole sampling; FLOPs are twice that",
    "peak_memory_mib": f"cuda: {MEANING['cuda']}; cpu: {MEANING['cpu']}",
}
"""Meaning of each column in the table that `dyndit bench --out` writes."""


@dataclass(frozen=True)
class Bench:
    """Settings of a benchmark."""

    batch_sizes: tuple[int, ...] = (1, 8, 64)
    repeats: Repeats = field(default_factory=Repeats)
    compiled: bool = False
    """Compile every block and exit head first, for all arms alike."""
    in_pipeline: bool = False
    """Time the plug-in inside an unmodified `DiTPipeline`, and the pipeline without the plug-in."""
    decoder: ModelMixin | None = None
    """Autoencoder that decodes latents; its time then counts for every arm."""

    def __post_init__(self) -> None:
        if (least := min(self.batch_sizes, default=0)) < 1:
            raise InputError(f"--batch-size {least}: expected at least 1")


def random_model(spec: str, device: str = "cpu") -> DynamicDepth:
    """Make "random:CARD": random weights, a plain exit after every layer. Raises InputError: there is no such card."""
    name = spec.removeprefix(RANDOM)
    if name not in CARDS:
        raise InputError(f"{spec}: no such card; after {RANDOM} {expected_one_of(name, CARDS)}")
    config = CARDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = ClassConditionalDiT(config)
        exits = Exits(backbone, ExitConfig(tuple(range(1, config.num_blocks)), "adaln-linear"))
    return DynamicDepth(backbone, exits, pixel_space=config.in_channels in (1, 3)).to(device).eval()


def open_decoder(spec: str, model: DynamicDepth) -> ModelMixin:
    """Load an autoencoder, or make one of random weights ("random:f8"), on the model's device, in its precision.

    Raises InputError: no autoencoder there, or its latents have other channels than the model's.
    """
    channels, weights = model.backbone.in_channels, next(model.parameters())
    if model.pixel_space:
        raise InputError(f"--vae {spec}: this model makes pixels; expected no autoencoder")
    if spec == RANDOM_DECODER:
        decoder = _random_autoencoder(channels, widths=(128, 256, 512, 512), layers_per_block=2)
    else:
        decoder = open_autoencoder(spec, model, "this model")
    if (found := latent_space(decoder).channels) != channels:
        raise InputError(f"--vae {spec}: latents of {found} channels; expected {channels}, which the model makes")
    return decoder.to(weights.device, weights.dtype)


def measure(
    model: DynamicDepth,
    plans: Mapping[str, DepthPlan],
    settings: Bench | None = None,
    *,
    name: str = "",
    on_round: Callable[[pd.DataFrame], str | None] | None = None,
    on_size: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Time one batch of every size under every plan -> a row per timed call and scope, columns as in COLUMNS.

    plans: the arms by name; the first is the baseline. They are checked against the model, and share solver, step count
    and guidance scale. name: the model's name in the table. on_round(rows of this batch size so far) is called after
    each round; what it returns is shown with the progress. on_size(rows of this batch size) is called when it is done.
    Raises InputError: a pipeline for a guided model without 1,000 classes: `DiTPipeline` would use a wrong null label.
    """
    settings, first = settings or Bench(), next(iter(plans.values()))
    weights = next(model.parameters())
    device = weights.device.type
    macs, meter = model_macs(model), energy_meter(device)
    if settings.compiled and not settings.in_pipeline:
        compile_parts(model)
    make_arms = _in_pipeline if settings.in_pipeline else _in_sampler
    same = {
        "model": name,
        "machine": manifest.machine(device),
        "device": device,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "compiled": "compiled" if settings.compiled else "eager",
        "solver": first.solver,
        "steps": first.num_steps,
        "cfg_scale": first.cfg_scale,
        "energy_source": "" if meter is None else meter.source,
    }
    tables = []
    for size in settings.batch_sizes:
        if settings.compiled:
            torch.compiler.reset()  # each size gets its own code, whichever came before
        arms = make_arms(model, plans, size, settings, meter)
        for run in tracked(list(arms.values()), f"batch of {size}: warming up", unit="arms"):
            run()
        peaks = {arm: peak_memory(arms[arm], device) for arm in tracked(list(arms), f"batch of {size}: peak memory")}
        cost = measure_cost(model, batch_size=size, solver=first.solver, cfg_scale=first.cfg_scale)
        run_plans = {arm: plans.get(arm, first) for arm in arms}

        def whole(
            rows: pd.DataFrame,
            size: int = size,
            cost: CostModel = cost,
            run_plans: Mapping[str, DepthPlan] = run_plans,
            peaks: Mapping[str, int] = peaks,
        ) -> pd.DataFrame:
            """Add the columns that do not come from the clock."""
            table = rows.assign(batch_size=size, **same)
            table["predicted_seconds"] = _predicted(table, run_plans, cost, decodes=settings.decoder is not None)
            table["share_of_blocks"] = table["arm"].map({a: p.share_of_blocks for a, p in run_plans.items()})
            table["macs"] = table["arm"].map({a: macs.plan(p) for a, p in run_plans.items()})
            table["peak_memory_mib"] = table["arm"].map({arm: peak / 2**20 for arm, peak in peaks.items()})
            return table[list(COLUMNS)]

        told = None if on_round is None else lambda rows, whole=whole: on_round(whole(rows))
        title = f"batch of {size}: timing"
        tables.append(whole(paired_rounds(arms, settings.repeats, next(iter(plans)), title=title, on_round=told)))
        if on_size is not None:
            on_size(tables[-1])
    return pd.concat(tables, ignore_index=True)


def _in_sampler(
    model: DynamicDepth, plans: Mapping[str, DepthPlan], size: int, settings: Bench, meter: EnergyMeter | None
) -> dict[str, Callable[[], list[Reading]]]:
    """Make a call per plan. It draws a batch twice: timed whole, then per network call (which makes a GPU wait)."""
    labels, decoder = model.backbone.condition.in_turn(size), settings.decoder
    whole = TO_UINT8 if model.pixel_space or decoder is not None else TO_LATENTS

    def draw(plan: DepthPlan, stats: bool) -> Samples:
        options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
        return sample(model, labels, plan=plan, batch_size=size, stats=stats, **options)

    def call(plan: DepthPlan) -> list[Reading]:
        spent = _metered(meter)
        drawn, decoding = draw(plan, stats=False), 0.0
        if decoder is not None:
            began = time.perf_counter()
            decode_latents(decoder, drawn.latents, size)  # ends on the host, so no work is pending
            decoding = time.perf_counter() - began
        readings = [Reading(whole, drawn.seconds + decoding, spent())]
        if decoder is not None:
            readings.append(Reading(DECODER, decoding))
        return [*readings, Reading(DENOISER, sum(draw(plan, stats=True).network_seconds))]

    return {name: (lambda plan=plan: call(plan)) for name, plan in plans.items()}


def _in_pipeline(
    model: DynamicDepth, plans: Mapping[str, DepthPlan], size: int, settings: Bench, meter: EnergyMeter | None
) -> dict[str, Callable[[], list[Reading]]]:
    """Make a call per plan of an unmodified `DiTPipeline` with the plug-in, and a call without the plug-in.

    Without the user's decoder, a tiny autoencoder decodes, so that a call is nearly all sampling.
    """
    some = next(iter(plans.values()))
    if not isinstance(model.backbone, ClassConditionalDiT):
        family = model.backbone.family
        raise InputError(f"--in-pipeline: DiTPipeline takes a class-conditional DiT, this model's family is {family}")
    classes = model.backbone.condition.num_classes
    if not isinstance(model.process, DDPM):
        raise InputError(f"--in-pipeline: DiTPipeline steps ddpm alone, this model's process is {model.process.name}")
    if some.cfg_scale != 1 and classes != PIPELINE_CLASSES:
        takes = f"DiTPipeline guides models of {PIPELINE_CLASSES} classes alone, this one has {classes}"
        raise InputError(f"--cfg-scale {some.cfg_scale:g}: {takes}; expected 1")
    weights = next(model.parameters())
    transformer = to_diffusers(model).to(weights.device, weights.dtype)
    if settings.compiled:
        compile_parts(DynamicDepth(adapt(transformer), model.exits))
    decoder = settings.decoder or _random_autoencoder(model.backbone.in_channels, widths=(1,), layers_per_block=1)
    pipe = DiTPipeline(transformer, decoder, make_scheduler(some.solver, some.num_steps, model.process))
    decoder.to(weights.device, weights.dtype)
    pipe.set_progress_bar_config(disable=True)
    labels = model.backbone.condition.in_turn(size)
    clock = Clock(weights.device)

    def whole() -> Reading:
        generators = [picture_generator(0, index) for index in range(size)]
        clock.wait()
        spent, began = _metered(meter), clock()
        steps = {"num_inference_steps": some.num_steps, "guidance_scale": some.cfg_scale}
        pipe(class_labels=labels, generator=generators, output_type="pt", **steps)
        return Reading(PIPELINE, clock() - began, spent())

    def plugged(plan: DepthPlan) -> list[Reading]:
        handle = apply_dyndit(pipe, model.exits, plan, check_identity=False)
        try:
            return [whole(), Reading(DENOISER, float(handle.stats()["seconds"].sum()))]
        finally:
            remove_dyndit(pipe)

    return {NO_PLUGIN: lambda: [whole()]} | {name: (lambda plan=plan: plugged(plan)) for name, plan in plans.items()}


def _metered(meter: EnergyMeter | None) -> Callable[[], float]:
    """Start the meter -> a function that returns the joules since then; NaN without a meter."""
    return (lambda: math.nan) if meter is None else meter.start()


def _predicted(table: pd.DataFrame, plans: Mapping[str, DepthPlan], cost: CostModel, *, decodes: bool) -> pd.Series:
    """Predict each row's seconds from the plan and the parts' measured times; NaN in the decoder's scope."""
    decoding = table.loc[table["scope"] == DECODER, "seconds"].median() if decodes else 0.0
    whole = table["arm"].map({arm: cost.plan_seconds(plan) for arm, plan in plans.items()})
    network = table["arm"].map({arm: cost.network_seconds(plan) for arm, plan in plans.items()})
    seconds = whole + decoding * (table["scope"] == TO_UINT8)
    return seconds.mask(table["scope"] == DENOISER, network).mask(table["scope"] == DECODER)


def _random_autoencoder(channels: int, *, widths: tuple[int, ...], layers_per_block: int) -> AutoencoderKL:
    """Make an autoencoder of random weights with these latent channels."""
    with torch.random.fork_rng(devices=[]):
        return AutoencoderKL(
            latent_channels=channels,
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=layers_per_block,
            norm_num_groups=1 if widths == (1,) else 32,
        ).eval()
