"""dyndit: Diffusion Transformers that stop early, and the measurements that say when that is worth it.

    model = dyndit.load("runs/digits")                 # a native folder, a published DiT .pt, or "digits"
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
    "measure_shifts": "calibration",
    "DepthPlan": "plan",
    "DynamicDepth": "dynamic",
    "ShiftTable": "routers.searched",
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
