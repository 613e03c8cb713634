"""Pipelines of diffusers behind the page: their own pictures at full depth, plans by the plug-in, no trace between."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dyndit
from dyndit.demo.opening import open_digits, open_studio
from dyndit.demo.pipeline import PipelineStudio
from dyndit.demo.studio import Request
from dyndit.errors import InputError
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.table import FILE
from dyndit.plugin.adapters import adapt
from dyndit.sampling.loop import picture_generator
from dyndit.storage.load import EXITS, save_exits
from support.models import randomise
from support.tables import random_table
from support.tiny_pipelines import TinyPipeline, tiny_pipeline

CLASSES = Request((207, 360), seed=3, solver="DDIMScheduler", steps=5, cfg_scale=4.0, budget=0.6)
PROMPTS = replace(CLASSES, values=("a red cat", "a moon"), solver="FlowMatchEulerDiscreteScheduler")
SIZE = (16, 24)


def alone(tiny: TinyPipeline, asked: Request, **more: object) -> torch.Tensor:
    """The pictures of the pipeline without a studio, uint8 (B, 3, H, W)."""
    generators = [picture_generator(asked.seed, i) for i in range(len(asked.values))]
    made = tiny.pipe(
        list(asked.values), num_inference_steps=asked.steps, guidance_scale=asked.cfg_scale, generator=generators,
        output_type="np", return_dict=False, **more,
    )[0]  # fmt: skip
    return torch.from_numpy((255 * made + 0.5).astype("uint8")).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("serves", "asked", "size"),
    [("DiTTransformer2DModel", CLASSES, ()), ("SD3Transformer2DModel", PROMPTS, SIZE)],
)
def test_full_depth_is_the_pipelines_own(serves: str, asked: Request, size: tuple[int, ...]) -> None:
    expected = alone(tiny_pipeline(serves), asked, **dict(zip(("height", "width"), size, strict=False)))
    studio = PipelineStudio(tiny_pipeline(serves).pipe, shape=size)
    shown = list(studio.draw(asked))
    assert [(full.step, dynamic and dynamic.step) for full, dynamic in shown] == [
        *((step, None) for step in range(1, 6)),
        *((step, step) for step in range(1, 6)),
    ]
    full, dynamic = shown[-1]
    assert torch.equal(full.pictures, expected)
    assert torch.equal(shown[4][0].pictures, expected)
    assert not torch.equal(dynamic.pictures, expected)
    assert all(pair[0].pictures.shape == expected.shape for pair in shown)  # every step is decoded
    assert not torch.equal(shown[1][0].pictures, expected)
    assert dynamic.seconds > 0
    again = list(studio.draw(asked))[-1]
    assert torch.equal(again[0].pictures, full.pictures)
    assert torch.equal(again[1].pictures, dynamic.pictures)


def test_the_plan_is_what_the_plug_in_runs() -> None:
    tiny = tiny_pipeline("DiTTransformer2DModel")
    studio = PipelineStudio(tiny.pipe)
    plan = studio.plan(CLASSES)
    *_, (_, dynamic) = studio.draw(CLASSES)
    assert plan.router == "skips"
    assert plan.share_of_blocks < 1
    other = tiny_pipeline("DiTTransformer2DModel")
    dyndit.apply_dyndit(other.pipe, ExitConfig(head="adaln-linear"), plan)
    assert torch.equal(dynamic.pictures, alone(other, CLASSES))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("serves", ["DiTTransformer2DModel", "FluxTransformer2DModel", "LatteTransformer3DModel"])
def test_guidance_is_seen(serves: str, scale: float) -> None:
    """In one batch (DiT, Latte) or in two calls (Flux)."""
    size = {"DiTTransformer2DModel": (), "LatteTransformer3DModel": (3, 16, 24)}.get(serves, SIZE)
    studio = PipelineStudio(tiny_pipeline(serves).pipe, shape=size)
    values = (207,) if studio.form.labels else ("a moon",)
    asked = replace(CLASSES, values=values, cfg_scale=scale, solver=studio.form.solvers[0], steps=4)
    assert studio.full(asked).cfg_scale == scale
    *_, (full, dynamic) = studio.draw(asked)
    assert full.pictures.shape == dynamic.pictures.shape
    assert full.pictures.ndim == (5 if len(size) == 3 else 4)


def test_another_solver_is_offered_and_run() -> None:
    studio = PipelineStudio(tiny_pipeline("DiTTransformer2DModel").pipe)
    assert studio.form.solvers == ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    own, other = (list(studio.draw(replace(CLASSES, solver=name)))[-1][0] for name in studio.form.solvers[:2])
    assert not torch.equal(own.pictures, other.pictures)


def test_a_visitor_who_leaves_holds_nobody_up() -> None:
    studio = PipelineStudio(tiny_pipeline("DiTTransformer2DModel").pipe)
    whole = list(studio.draw(CLASSES))
    for left_at in (1, 7):
        drawing = studio.draw(CLASSES)
        for _ in range(left_at):
            next(drawing)
        drawing.close()
        again = list(studio.draw(CLASSES))
        assert torch.equal(again[-1][1].pictures, whole[-1][1].pictures)


@pytest.mark.parametrize(
    "change",
    [{"values": (1000,)}, {"values": (-1,)}, {"values": (1,) * 5}, {"solver": "nope"}, {"steps": 0}, {"seed": -1}],
)
def test_what_lies_outside_the_bounds_is_refused(change: dict[str, object]) -> None:
    studio = PipelineStudio(tiny_pipeline("DiTTransformer2DModel").pipe)
    with pytest.raises(InputError):
        next(studio.draw(replace(CLASSES, **change)))


def test_a_folder_is_opened_with_its_exits_and_its_table(tmp_path: Path) -> None:
    tiny = tiny_pipeline("DiTTransformer2DModel")
    tiny.pipe.save_pretrained(tmp_path / "pipe")
    assert open_studio(str(tmp_path / "pipe")).plan(CLASSES).router == "skips"
    adapter = adapt(tiny.transformer)
    exits = Exits(adapter, ExitConfig())
    randomise(exits, 1)
    model = dyndit.DynamicDepth(adapter, exits)
    save_exits(exits, tmp_path / "exits" / EXITS, model.identity.backbone)
    studio = open_studio(str(tmp_path / "pipe"), exits=tmp_path / "exits")
    assert studio.plan(CLASSES).router == "ramp"
    table = replace(random_table(10, 3, seed=3), cfg_scale=4.0)
    bound = {"backbone": model.identity.backbone, "exits": studio._handle.model.identity.exits}
    replace(table, **bound).save(tmp_path / "exits" / FILE)
    studio = open_studio(str(tmp_path / "pipe"), exits=tmp_path / "exits")
    assert studio.form.scale == 4.0
    assert studio.plan(CLASSES).router == "searched"
    assert studio.planner.frontier(studio.full(CLASSES))
    *_, (full, dynamic) = studio.draw(CLASSES)
    assert torch.equal(full.pictures, alone(tiny, CLASSES))
    assert not torch.equal(full.pictures, dynamic.pictures)


def test_digits_open_from_any_run_that_has_their_table(tmp_path: Path, make_model) -> None:
    """A quickstart of other settings, or of an older version, is no reason to make exits again."""
    model = make_model(num_blocks=4)
    model.save_pretrained(tmp_path / "model")
    bound = {"backbone": model.identity.backbone, "exits": model.identity.exits}
    replace(random_table(10, 3, seed=3), **bound).save(tmp_path / "model" / FILE)
    (tmp_path / "manifest.json").write_text("{}")
    studio = open_digits(tmp_path, "cpu")
    assert studio.name == "digits"
    assert studio.plan(Request((3,))).router == "searched"


def test_what_is_no_pipeline_of_one_transformer_is_refused(tmp_path: Path, make_model) -> None:
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "exits").mkdir()
    with pytest.raises(InputError, match="--exits"):
        open_studio(str(tmp_path / "model"), exits=tmp_path / "exits")
    pipe = tiny_pipeline("DiTTransformer2DModel").pipe
    with pytest.raises(InputError, match="--shape"):
        PipelineStudio(pipe, shape=(16, 16))
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(InputError, match="--vae"):
        open_studio(str(tmp_path / "pipe"), vae=tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "vae" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no pipeline that loads"):
        open_studio(str(tmp_path / "pipe"))


def test_the_own_pipeline_is_opened_as_its_model(tmp_path: Path, make_model) -> None:
    model = make_model(num_blocks=4)
    bound = {"backbone": model.identity.backbone, "exits": model.identity.exits}
    table = replace(random_table(10, 3, seed=3), **bound)
    pipe = dyndit.DynDiTPipeline.from_model(model)
    pipe.register_modules(router=table)
    pipe.save_pretrained(tmp_path)
    studio = open_studio(str(tmp_path))
    assert studio.plan(Request((3,))).router == "searched"


def test_no_code_of_a_folder_runs(tmp_path: Path) -> None:
    tiny_pipeline("DiTTransformer2DModel").pipe.save_pretrained(tmp_path / "pipe")
    ran, index = tmp_path / "ran", tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["mine", "Mine"]}))
    code = f"from diffusers import DiTPipeline as Mine\nopen({str(ran)!r}, 'w').close()\nMine.__module__ = __name__\n"
    (tmp_path / "pipe" / "mine.py").write_text(code)
    with pytest.raises(InputError, match="no pipeline that loads"):
        open_studio(str(tmp_path / "pipe"))
    assert not ran.exists()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    tiny_pipeline("DiTTransformer2DModel").pipe.save_pretrained(tmp_path / "pipe", safe_serialization=False)
    with pytest.raises(InputError, match="no pipeline that loads"):
        open_studio(str(tmp_path / "pipe"))
