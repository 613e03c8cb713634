"""Refuse what would make another picture than the plan's: other hooks, guidance that changed, steps left out."""

# pyright: reportPrivateUsage=false
# torch and diffusers keep to themselves what is looked at here.

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from dyndit.errors import InputError, PlanError
from dyndit.models.base import Inputs
from dyndit.models.conditions import Conditioning
from dyndit.models.dynamic import Work
from dyndit.plans.plan import DepthPlan
from dyndit.plugin.adapters import Adapter
from dyndit.plugin.call import Call

_CACHED = (
    "transformer: has the cache {} beside the plug-in; expected one of them, as after `transformer.disable_cache()` or "
    "remove_dyndit"
)
_WORDS = {True: "guided", False: "unguided"}


def check_hookable(transformer: nn.Module, name: str) -> None:
    """Refuse hooks and whole-model compilation, because the plug-in, the hook `name`, would bypass them.

    Raises:
        InputError: naming the hook, and what to do.
    """
    if isinstance(transformer, torch._dynamo.OptimizedModule) or transformer._compiled_call_impl is not None:
        raise InputError(
            "transformer: compiled as a whole, which fixes its depth; expected its blocks compiled one by one, as by "
            "`for block in transformer.transformer_blocks: block.compile(fullgraph=True)`"
        )
    registry: HookRegistry | None = transformer.__dict__.get("_diffusers_hook")
    names = list(registry.hooks) if registry is not None else []
    if name in names:
        raise InputError("transformer: has the plug-in already; expected `handle.plan = ...`, or remove_dyndit first")
    if names:
        raise InputError(f"transformer: has the hook {names[0]}; expected apply_dyndit before other hooks are added")
    if "_hf_hook" in transformer.__dict__:
        raise InputError("transformer: is offloaded already; expected apply_dyndit before enable_model_cpu_offload")


def check_beside(transformer: nn.Module) -> None:
    """Refuse hooks that count on every block at every step, or that split tokens among devices.

    Caches of diffusers skip work by what earlier calls did; exits leave blocks out. Exit heads are not in the plan by
    which context parallelism gathers tokens.

    Raises:
        InputError: naming the hook, and what to do.
    """
    if isinstance(transformer, CacheMixin) and transformer.is_cache_enabled:
        raise InputError(_CACHED.format(type(transformer._cache_config).__name__))
    for module in transformer.modules():
        registry: HookRegistry | None = module.__dict__.get("_diffusers_hook")
        for name, hook in ({} if registry is None else registry.hooks).items():
            if hook._is_stateful:
                raise InputError(_CACHED.format(name))
            if isinstance(hook, ContextParallelSplitHook | ContextParallelGatherHook):
                raise InputError(
                    f"transformer: has the hook {name} of context parallelism, which no exit passes; expected whole "
                    f"tokens on each device, or remove_dyndit"
                )


def check_processors(transformer: nn.Module) -> None:
    """Refuse attention that takes the batch apart by itself: a branch of perturbed attention.

    Raises:
        InputError: naming the processor.
    """
    for module in transformer.modules():
        name = type(getattr(module, "processor", None)).__name__
        if name.startswith("PAG"):
            raise InputError(f"transformer: its attention is {name}, a further branch of each batch; expected two")


def check_rows(inputs: Inputs, adapter: Adapter) -> None:
    """Refuse a call whose conditions have other rows than its latents.

    Raises:
        InputError: naming the argument and both numbers of rows.
    """
    rows = inputs.y.rows if isinstance(inputs.y, Conditioning) else {"class_labels": inputs.y}
    for name, value in rows.items():
        if len(value) != len(inputs):
            raise InputError(f"{adapter.family}: called with {len(value)} rows of {name} for {len(inputs)} of latents")


def check_guidance(adapter: Adapter, inputs: Inputs, guided: bool, call: Call, *, second: bool) -> None:
    """Refuse a guided call under an unguided plan, and the reverse, if the rows show the difference.

    Every call is looked at: a callback can switch guidance in the middle, and two pictures that start from the same
    noise look like two branches at first.

    Raises:
        PlanError: naming the plan's and the call's guidance.
    """
    separate = adapter.guidance == "calls"
    found = True if second else adapter.is_guided(inputs)
    if second and not separate and guided:
        raise PlanError(
            "plan: made for branches in one batch, but the pipeline calls once per branch; expected one call"
        )
    if separate and guided and not second and call.passes == 1 and call.records:
        found = False  # the step before, or this one if it comes again, made one call
    if found is not None and found != guided:
        raise PlanError(f"plan: made for {_WORDS[guided]} sampling, but the pipeline's call is {_WORDS[found]}")
    if guided and not separate and len(inputs) % 2:
        raise PlanError(f"plan: made for guided sampling, but the call has {len(inputs)} rows; expected two branches")


def check_goes_on(plan: DepthPlan, call: Call, k: int, work: Work, rows: int) -> None:
    """Refuse a step that does not continue the steps before it.

    Raises:
        PlanError: the number of rows changed, or a step needs the memory of earlier steps that did not run.
    """
    records = call.records
    before = sum(there for _, there, _ in records[-1].branches) if records else rows
    if rows != before:
        raise PlanError(f"plan: called with {rows} rows at step {k}, {before} before; expected guidance to stay on")
    missing = k - len({record.step for record in records} & set(range(k)))
    if missing and (work.forecast or work.held):
        raise PlanError(
            f"plan: step {k} ({plan.steps[k]}) builds on the steps before it, of which this call left out "
            f"{missing}; expected a call that runs the whole plan"
        )
