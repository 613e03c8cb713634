"""dyndit: Diffusion Transformers that stop early, and the measurements that say when that is worth it.

    model = dyndit.load("runs/digits")                 # a folder, a published DiT .pt, "digits" or a hub id
    model(x, t, y)                                      # full depth: the original model, bit for bit
    model(x, t, y, depth=6)                             # the exit after layer 6
    dyndit.sample(model, labels, plan=plan)             # noise to pictures under a plan
    dyndit.calibrate(model, table=table, budget=0.6)    # -> DepthPlan

Names load on first use, so that `import dyndit` is quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "load": "checkpoints",
    "save": "checkpoints",
    "sample": "sampler",
    "calibrate": "calibration",
    "CalibrationSettings": "calibration",
    "calibrate_pipeline": "calibration",
    "calibrate_steps": "calibration",
    "measure_bases": "calibration",
    "measure_shifts": "calibration",
    "record_calls": "recording",
    "record_sampling": "recording",
    "RecordedCalls": "recording",
    "Distill": "tasks",
    "distill_exits": "tasks",
    "picture_generator": "sampler",
    "match_frequencies": "formats.diffusers_names",
    "apply_dyndit": "plugin",
    "collect_exits": "adapters",
    "remove_dyndit": "plugin",
    "DepthPlan": "plan",
    "Backbone": "backbones",
    "State": "backbones",
    "ExitConfig": "exits",
    "Exits": "exits",
    "FitConfig": "training",
    "ramp": "routers.schedules",
    "LatencyBudget": "routers.steps",
    "TargetFD": "routers.steps",
    "open_data": "data",
    "load_extractor": "analysis",
    "DynDiTPipeline": "pipeline",
    "DynamicDepth": "dynamic",
    "ShiftTable": "routers.searched",
    "ConfidentDepth": "routers.confidence",
    "InputError": "errors",
    "CheckpointError": "errors",
    "PlanError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
