"""dyndit: Diffusion Transformers that stop early, and measurements of when early stopping pays off.

    model = dyndit.load("runs/digits")                 # a folder, a published DiT .pt, "digits" or a hub id
    model(x, t, y)                                      # full depth: the original model, bit for bit
    model(x, t, y, depth=6)                             # the exit after layer 6
    dyndit.sample(model, labels, plan=plan)             # noise to pictures under a plan
    dyndit.calibrate(model, table=table, budget=0.6)    # -> DepthPlan
    dyndit.apply_dyndit(pipe)                           # a pipeline of diffusers
    dyndit.register("my-dit", MyDiT)                    # a model of your own

Each name's help has an example: `help(dyndit.sample)`. Names load on first use, so that `import dyndit` is quick.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `as` marks the names as public for type checkers
    from dyndit.analysis.metrics.extractors import load_extractor as load_extractor
    from dyndit.calibration.calibrate import calibrate as calibrate
    from dyndit.calibration.measure import CalibrationSettings as CalibrationSettings
    from dyndit.errors import InputError as InputError
    from dyndit.models.base import Backbone as Backbone
    from dyndit.models.base import State as State
    from dyndit.models.conditions import ClassLabels as ClassLabels
    from dyndit.models.dynamic import DynamicDepth as DynamicDepth
    from dyndit.models.exits import ExitConfig as ExitConfig
    from dyndit.models.registry import register as register
    from dyndit.plans.plan import DepthPlan as DepthPlan
    from dyndit.plans.schedules import ramp as ramp
    from dyndit.plans.step import Step as Step
    from dyndit.plugin.apply import apply_dyndit as apply_dyndit
    from dyndit.plugin.apply import remove_dyndit as remove_dyndit
    from dyndit.plugin.calibrate import calibrate_pipeline as calibrate_pipeline
    from dyndit.plugin.distill import distill_exits as distill_exits
    from dyndit.plugin.pipeline import DynDiTPipeline as DynDiTPipeline
    from dyndit.plugin.recording import record_calls as record_calls
    from dyndit.process import DDPM as DDPM
    from dyndit.process import RectifiedFlow as RectifiedFlow
    from dyndit.sampling.sample import sample as sample
    from dyndit.storage.load import load as load
    from dyndit.training.config import FitConfig as FitConfig
    from dyndit.training.data import open_data as open_data
    from dyndit.training.distill import Distill as Distill
    from dyndit.training.train import Train as Train

__version__ = "0.1.0"

_HOME = {
    "Backbone": "models.base",
    "DDPM": "process.ddpm",
    "RectifiedFlow": "process.flow",
    "CalibrationSettings": "calibration.measure",
    "ClassLabels": "models.conditions",
    "DepthPlan": "plans.plan",
    "Distill": "training.distill",
    "DynDiTPipeline": "plugin.pipeline",
    "DynamicDepth": "storage.pretrained",
    "ExitConfig": "models.exits",
    "FitConfig": "training.config",
    "InputError": "errors",
    "State": "models.base",
    "Step": "plans.step",
    "Train": "training.train",
    "apply_dyndit": "plugin.apply",
    "calibrate": "calibration.calibrate",
    "calibrate_pipeline": "plugin.calibrate",
    "distill_exits": "plugin.distill",
    "load": "storage.load",
    "load_extractor": "analysis.metrics.extractors",
    "open_data": "training.data",
    "ramp": "plans.schedules",
    "record_calls": "plugin.recording",
    "register": "models.registry",
    "remove_dyndit": "plugin.apply",
    "sample": "sampling.sample",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]  the imports above say the same to checkers

if not TYPE_CHECKING:  # a checker refuses unknown names

    def __getattr__(name: str) -> object:
        """Import a public name from its module."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        import_module(f"{__name__}.storage.pretrained")  # so that every model can be saved
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *__all__])
