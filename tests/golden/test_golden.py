"""Golden outputs: what revision 3b06d2a drew, before steps were typed data and models carried their process.

`outputs.npz` holds the first picture of each case, in 8 or 16 bits; `digests.json` the SHA-256 of the whole output, for
every machine and torch release that it was recorded with. There, outputs are equal to the bit. Elsewhere kernels round
differently, and pictures agree to two of 255 levels.

Cases of the CIFAR-10 backbone were recorded again when its weights were replaced, by code that drew those of the old
weights as 3b06d2a did.

`PYTHONPATH=tests python tests/golden/test_golden.py` records the digests of this machine, and the pictures of the cases
that are named behind it: those that are meant to change. A new machine's digests are those of a revision that passed on
a known one: d81abb2 drew the first ones here.
"""

import hashlib
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dyndit
from dyndit import files, manifest
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import guidance_interval, ramp
from dyndit.plans.step import steps
from dyndit.plugin.adapters import adapt
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample
from dyndit.storage import load as checkpoints
from support.models import balanced_labels
from support.tiny_pipelines import TINY_PIPELINES, tiny_pipeline

ROOT = Path(__file__).parents[2]
RECORDED, DIGESTS = (Path(__file__).with_name(name) for name in ("outputs.npz", "digests.json"))
PUBLISHED = [
    path for path in sorted((ROOT / "docs" / "results").glob("*/plans/*.json")) if files.read_json(path)["version"] == 1
]
"""Plans of version 1, as the published comparisons left them."""
SOLVERS = ("ddpm", "ddim", "dpmpp", "unipc", "euler")
"""The solvers that outputs were recorded of."""
LEVELS = 2

Draw = Callable[[], np.ndarray]


def shaken(module: nn.Module) -> nn.Module:
    """Move every parameter by a little noise that depends on its name alone."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


def with_exits(name: str, head: str, gains: bool) -> DynamicDepth:
    base = checkpoints.load(name if name == "digits" else ROOT / "recipes" / "weights" / name, device="cpu")
    torch.manual_seed(0)
    exits = shaken(Exits(base.backbone, ExitConfig(head=head)))
    if gains:
        generator = torch.Generator().manual_seed(5)
        exits.gains = nn.Parameter(0.1 * torch.randn(len(exits.layers), 2, 4, generator=generator))
    return DynamicDepth(base.backbone, exits, pixel_space=base.pixel_space).eval()


def draw(model: DynamicDepth, plan: object = None, num: int = 4, **options: object) -> np.ndarray:
    options = {"solver": "ddim", "num_steps": 10, "cfg_scale": 1.5, **options}
    if isinstance(plan, DepthPlan):
        options |= {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
    return sample(model, balanced_labels(num, 10), plan=plan, batch_size=num, **options).pictures.numpy()


def unbound(path: Path) -> DepthPlan:
    """A published plan for any model: the weights that it was made for were not kept."""
    return replace(DepthPlan.load(path), backbone="", exits="")


def sampler_cases() -> Iterator[tuple[str, Draw]]:
    """Every solver with full, mixed and ramp plans: own guides, held guidance, forecasts, unequal branches."""
    models = {
        "digits-plain": with_exits("digits", "adaln-linear", gains=False),
        "digits-wide": with_exits("digits", "wide", gains=False),
        "digits-gain": with_exits("digits", "wide", gains=True),
        "cifar10": with_exits("cifar10", "wide", gains=True),
    }
    plain = models["digits-plain"]
    for name, model in (("digits", plain), ("cifar10", models["cifar10"])):
        for solver in SOLVERS:
            for scale in (1.5, 1.0):
                options = {"solver": solver, "cfg_scale": scale, "num_steps": 6}
                yield f"full/{name}/{solver}/{scale}", partial(draw, model, **options)
    yield "full/digits/guided-1", partial(draw, plain, guided_channels=0)
    for name in ("digits-plain", "digits-wide", "digits-gain"):
        for solver in SOLVERS:
            mixed = steps("12|12", "4|2", "12|12", "4+|held", "6", "3+", "8|e3", "5|9")
            plan = full_plan(models[name], solver, 8, 1.5).with_steps(mixed)
            yield f"mixed/{name}/{solver}", partial(draw, models[name], plan)
            yield f"ramp/{name}/{solver}", partial(draw, models[name], partial(ramp, start=3), solver=solver)
    interval = guidance_interval(full_plan(plain, "ddim", 8, 1.5), 0.5, 10.0)
    yield "interval/digits", partial(draw, plain, interval)
    for path in PUBLISHED:
        run = path.parent.parent.name
        model, num = (models["cifar10"], 2) if run.startswith("cifar10") else (models["digits-gain"], 3)
        yield f"plans/{run}/{path.stem}", partial(draw, model, unbound(path), num)
    pipe = dyndit.DynDiTPipeline.from_model(models["digits-wide"], solver="unipc")
    pipe.set_progress_bar_config(disable=True)
    plan = unbound(ROOT / "docs" / "results" / "ablation" / "plans" / "plan-unipc-10-b0.3.json")
    options = {"output_type": "pt", "num_inference_steps": 10}
    yield "dynditpipeline/full", lambda: pipe([3, 7], seed=0, **options).images.numpy()
    yield "dynditpipeline/plan", lambda: pipe([3, 7], seed=0, plan=plan, output_type="pt").images.numpy()
    interval = {"seeds": [4, 5], "guidance_interval": (0.5, 10.0)}
    yield "dynditpipeline/interval", lambda: pipe([3, 7], **interval, **options).images.numpy()


def plugin_cases(family: str, guided: bool) -> Iterator[tuple[str, Draw]]:
    """A tiny pipeline as it is, under the plug-in at full depth, under a mixed plan and under a ramp."""
    tiny = tiny_pipeline(family)
    name, kind = f"pipeline/{family}", "guided" if guided else "unguided"

    def drawn() -> np.ndarray:
        return tiny.run(guided=guided, count=2).float().numpy()

    yield f"{name}/{kind}/untouched", drawn
    exits = shaken(Exits(adapt(tiny.transformer), ExitConfig(head="adaln-linear")).requires_grad_(False))
    handle = dyndit.apply_dyndit(tiny.pipe, exits, None, cfg_scale=4.0 if guided else 1.0)
    yield f"{name}/{kind}/full", drawn
    full, mixed = handle.full_plan(), steps("2|1", "4", "3|e1") if guided else steps("1", "3", "2")
    handle.plan = full.with_steps(mixed[: full.num_steps])
    yield f"{name}/{kind}/plan", drawn
    handle.plan = partial(ramp, start=1)
    yield f"{name}/{kind}/ramp", drawn
    dyndit.remove_dyndit(tiny.pipe)


def entry(output: np.ndarray) -> tuple[str, np.ndarray]:
    """The digest of an output, and its first picture."""
    first = output[0] if output.dtype == np.uint8 else output[0].astype(np.float16)
    return hashlib.sha256(np.ascontiguousarray(output).tobytes()).hexdigest(), first


def here() -> str:
    """The machine and the release that digests hold on: kernels are chosen by the generation of a CPU, too."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    generation = "/".join(known.get(name, "") for name in ("cpu family", "model", "stepping"))
    return f"{manifest.machine('cpu').rsplit(',', 1)[0]}, generation {generation}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Outputs were recorded on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return dict(file)


def check(cases: Iterator[tuple[str, Draw]], recorded: dict[str, np.ndarray]) -> set[str]:
    """Compare the cases with what was recorded -> their names."""
    names, known = set(), files.read_json(DIGESTS).get(here())
    for name, drawn in cases:
        digest, first = entry(drawn())
        expected = recorded[name]
        unit = 255 if first.dtype == np.uint8 else max(1.0, float(np.abs(expected).max()))
        difference = np.abs(first.astype(np.float64) - expected.astype(np.float64)).max()
        assert difference <= LEVELS / 255 * unit, f"{name}: differs by {difference:g}"
        assert known is None or digest == known[name], f"{name}: another output, bit for bit"
        names.add(name)
    return names


with np.load(RECORDED) as _file:
    RECORDED_FAMILIES = sorted(name for name in TINY_PIPELINES if f"pipeline/{name}/guided/full" in _file)
"""Families that were there when the outputs were recorded."""


def test_sampling_draws_what_it_drew(recorded: dict[str, np.ndarray]) -> None:
    names = check(sampler_cases(), recorded)
    assert sum(name.startswith("plans/") for name in names) == len(PUBLISHED) > 100


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("family", RECORDED_FAMILIES)
def test_pipelines_draw_what_they_drew(recorded: dict[str, np.ndarray], family: str, guided: bool) -> None:
    assert len(check(plugin_cases(family, guided), recorded)) == 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    with np.load(RECORDED) as file:
        pictures = dict(file)
    plugin = (case for family in RECORDED_FAMILIES for guided in (True, False) for case in plugin_cases(family, guided))
    outputs = {name: entry(drawn()) for cases in (sampler_cases(), plugin) for name, drawn in cases}
    files.write_json(
        DIGESTS, files.read_json(DIGESTS) | {here(): {name: digest for name, (digest, _) in outputs.items()}}
    )
    if named := sys.argv[1:]:
        np.savez_compressed(RECORDED, **pictures | {name: outputs[name][1] for name in named})
