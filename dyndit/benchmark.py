"""Time plans against each other: paired, alternating, warmed up, in one process; in our sampler or in a pipeline."""

import time
from collections.abc import Mapping

import pandas as pd
import torch
from diffusers import AutoencoderKL, DiTPipeline

from dyndit.adapters import adapt
from dyndit.analysis.latency import order_of
from dyndit.backbones import CARDS, ClassConditionalDiT
from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError
from dyndit.exits import ExitConfig, Exits
from dyndit.formats.diffusers_folder import to_diffusers
from dyndit.plan import DepthPlan
from dyndit.plugin import apply_dyndit, remove_dyndit
from dyndit.runtime import compile_parts
from dyndit.sampler import balanced_labels, make_scheduler, picture_generator, sample

RANDOM = "random:"
"""Before a card's name: a model of random weights, for times, which need no others."""

NO_PLUGIN = "no plug-in"

PIPELINE_CLASSES = 1000
"""`DiTPipeline` takes the label after 1,000 classes for the null label, whatever the model."""


def random_model(spec: str, device: str = "cpu") -> DynamicDepth:
    """A model of random weights with an exit after every layer, of "random:" and a card's name.

    Raises:
        InputError: no such card.
    """
    name = spec.removeprefix(RANDOM)
    if name not in CARDS:
        raise InputError(f"{spec}: no such card; expected {RANDOM} and one of {', '.join(CARDS)}")
    config = CARDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = ClassConditionalDiT(config)
        exits = Exits(backbone, ExitConfig(tuple(range(1, config.num_blocks))))
    return DynamicDepth(backbone, exits, pixel_space=config.in_channels in (1, 3)).to(device).eval()


def time_plans(
    model: DynamicDepth,
    plans: Mapping[str, DepthPlan],
    *,
    batch_size: int,
    rounds: int,
    warmup: int = 1,
    compiled: bool = False,
) -> pd.DataFrame:
    """Draw one batch under every plan, round by round. `compiled`: the model's blocks and heads are compiled first.

    -> columns round, arm, scope ("noise to uint8" or "denoiser", the network alone), seconds. Order changes from
    round to round. Each scope has a call of its own, as timing the parts makes a GPU wait between them.
    """
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: expected at least 1")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected at least 1")
    if compiled:
        compile_parts(model)
    labels = balanced_labels(batch_size, model.backbone.num_classes)
    names, rows = list(plans), []
    for k in range(-warmup, rounds):
        for name in order_of(names, k):
            plan = plans[name]
            draw = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
            whole, parts = (
                sample(model, labels, plan=plan, batch_size=batch_size, stats=stats, **draw) for stats in (False, True)
            )
            if k >= 0:
                rows.append({"round": k, "arm": name, "scope": "noise to uint8", "seconds": whole.seconds})
                network = sum(parts.network_seconds)
                rows.append({"round": k, "arm": name, "scope": "denoiser", "seconds": network})
    return pd.DataFrame(rows)


def time_in_pipeline(
    model: DynamicDepth,
    plans: Mapping[str, DepthPlan],
    *,
    batch_size: int,
    rounds: int,
    warmup: int = 1,
    compiled: bool = False,
) -> pd.DataFrame:
    """Time plans as the plug-in runs them inside an unmodified `DiTPipeline`, beside the pipeline without it.

    -> columns round, arm, scope ("pipeline call", or "denoiser", the transformer alone), seconds. The arm
    "no plug-in" is the pipeline as diffusers has it, without a denoiser time of its own. Decoding is by the smallest of
    autoencoders, so that a call is sampling and little else.

    Raises:
        InputError: guidance, for a model of other than 1,000 classes, whose null label the pipeline does not know.
    """
    some = next(iter(plans.values()))
    classes = model.backbone.num_classes
    if some.cfg_scale != 1 and classes != PIPELINE_CLASSES:
        raise InputError(
            f"--cfg-scale {some.cfg_scale:g}: DiTPipeline guides models of {PIPELINE_CLASSES} classes alone, this one "
            f"has {classes}; expected 1"
        )
    device = next(model.parameters()).device
    transformer = to_diffusers(model).to(device)
    if compiled:
        compile_parts(DynamicDepth(adapt(transformer), model.exits))
    pipe = DiTPipeline(transformer, _smallest_decoder(model), make_scheduler(some.solver, some.num_steps))
    pipe.to(device).set_progress_bar_config(disable=True)
    labels = balanced_labels(batch_size, classes)
    wait = torch.cuda.synchronize if device.type == "cuda" else float

    def seconds() -> float:
        generators = [picture_generator(0, index) for index in range(batch_size)]
        wait()
        began = time.perf_counter()
        pipe(
            class_labels=labels,
            guidance_scale=some.cfg_scale,
            num_inference_steps=some.num_steps,
            generator=generators,
            output_type="pt",
        )
        wait()
        return time.perf_counter() - began

    arms, rows = [NO_PLUGIN, *plans], []
    for k in range(-warmup, rounds):
        for name in order_of(arms, k):
            handle = None if name == NO_PLUGIN else apply_dyndit(pipe, model.exits, plans[name], check_trunk=False)
            whole = seconds()
            if k >= 0:
                rows.append({"round": k, "arm": name, "scope": "pipeline call", "seconds": whole})
            if handle is not None:
                if k >= 0:
                    denoiser = float(handle.stats()["seconds"].sum())
                    rows.append({"round": k, "arm": name, "scope": "denoiser", "seconds": denoiser})
                remove_dyndit(pipe)
    return pd.DataFrame(rows)


def _smallest_decoder(model: DynamicDepth) -> AutoencoderKL:
    """An autoencoder of the model's channels that hardly costs anything."""
    with torch.random.fork_rng(devices=[]):
        return AutoencoderKL(
            latent_channels=model.backbone.in_channels, block_out_channels=(1,), layers_per_block=1, norm_num_groups=1
        ).eval()
