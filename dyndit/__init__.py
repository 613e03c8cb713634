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
    "load": "storage.load",
    "save": "storage.load",
    "sample": "sampling.sample",
    "calibrate": "calibration.calibrate",
    "CalibrationSettings": "calibration.measure",
    "calibrate_pipeline": "plugin.calibrate",
    "calibrate_steps": "calibration.calibrate",
    "measure_bases": "calibration.calibrate",
    "measure_shifts": "calibration.measure",
    "record_calls": "plugin.recording",
    "record_sampling": "plugin.recording",
    "RecordedCalls": "plugin.recording",
    "Distill": "training.distill",
    "distill_exits": "plugin.distill",
    "picture_generator": "sampling.loop",
    "match_frequencies": "storage.names",
    "apply_dyndit": "plugin.apply",
    "collect_exits": "plugin.adapters",
    "remove_dyndit": "plugin.apply",
    "DepthPlan": "plans.plan",
    "Backbone": "models",
    "State": "models",
    "ExitConfig": "models.exits",
    "Exits": "models.exits",
    "FitConfig": "training.config",
    "ramp": "plans.schedules",
    "LatencyBudget": "plans.step_counts",
    "TargetFD": "plans.step_counts",
    "open_data": "training.data",
    "load_extractor": "analysis",
    "DynDiTPipeline": "plugin.pipeline",
    "DynamicDepth": "storage.pretrained",
    "ShiftTable": "plans.table",
    "ConfidentDepth": "analysis.compare.peers.confidence",
    "InputError": "errors",
    "CheckpointError": "errors",
    "PlanError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.storage.pretrained")  # whatever makes a model, it can be saved
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
