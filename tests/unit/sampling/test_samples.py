"""What a sampling returns: it is looked at, saved and put beside others; and a plan comes from a file or a budget."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dyndit
from dyndit.analysis.metrics.sets import read_pictures
from dyndit.errors import InputError, PlanError
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures.rows import in_rows
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp
from dyndit.plans.step import Step
from dyndit.plans.table import ShiftTable
from dyndit.sampling.loop import full_plan
from dyndit.sampling.sample import sample, sample_into
from dyndit.stats import Moments, moments
from dyndit.storage import load as checkpoints

LABELS = [3, 1, 4, 1]


@pytest.fixture(scope="module")
def model(make_model) -> DynamicDepth:
    return make_model(layers=(2, 4))


@pytest.fixture(scope="module")
def table(model: DynamicDepth) -> ShiftTable:
    """A table of this model, random, with times of this device."""
    generator = torch.Generator().manual_seed(0)
    choices, bands, size = (Step.parse("2|2"), Step.parse("4|4")), 2, 3
    random = torch.randn(40, size, generator=generator, dtype=torch.float64)
    parts = PartTimes(0.1, 1.0, 0.1, 0.1)
    return ShiftTable(
        edges=(950.0, 475.0, 0.0),
        choices=choices,
        mean=0.1 * torch.randn(bands, len(choices), size, generator=generator, dtype=torch.float64),
        second=torch.zeros(bands, len(choices), size, size, dtype=torch.float64),
        base=moments(random),
        reference=moments(random + 0.1),
        cost=CostModel(8, model.num_blocks, parts, parts, 0.05),
        num_blocks=model.num_blocks,
        solver="ddim",
        num_steps=2,
        cfg_scale=1.5,
        seed=0,
        num_pictures=40,
        extractor="toy",
        extractor_fingerprint="toy",
        backbone=model.identity.backbone,
        exits=model.identity.exits,
    )


def test_a_plan_may_be_a_file(model: DynamicDepth, tmp_path: Path) -> None:
    plan = ramp(full_plan(model, "unipc", 3, 2.0), model.depths, 2)
    plan.save(tmp_path / "p.json")
    for given in (tmp_path / "p.json", str(tmp_path / "p.json")):
        drawn = sample(model, LABELS, plan=given)  # solver, steps and scale are the plan's
        assert drawn.plan == plan
        assert torch.equal(drawn.pictures, sample(model, LABELS, plan=plan).pictures)
    expected = sample(model, LABELS, plan=plan, solver="unipc", num_steps=3, cfg_scale=2.0)
    assert torch.equal(drawn.pictures, expected.pictures)
    with pytest.raises(PlanError, match=r"p\.json: made for 3 steps"):
        sample(model, LABELS, plan=tmp_path / "p.json", num_steps=4)


def test_a_budget_is_searched_at_call_time(model: DynamicDepth, table: ShiftTable, tmp_path: Path) -> None:
    drawn = sample(model, LABELS, budget=0.6, table=table, num_steps=4)
    assert drawn.plan.router == "searched"
    assert drawn.plan.budget == 0.6
    assert drawn.plan.share_of_blocks < 0.9
    checkpoints.save(model, tmp_path / "model")
    table.save(tmp_path / "model" / "shift-table.safetensors")
    for options in ({"table": tmp_path / "model"}, {"table": tmp_path / "model" / "shift-table.safetensors"}, {}):
        again = sample(dyndit.load(tmp_path / "model"), LABELS, budget=0.6, num_steps=4, **options)
        assert again.plan == drawn.plan
        assert torch.equal(again.pictures, drawn.pictures)


def test_a_budget_needs_a_table_and_no_plan(model: DynamicDepth, table: ShiftTable, make_model) -> None:
    lone = make_model(layers=(2, 4))
    for options, message in (
        ({"budget": 0.6}, "loaded from no folder"),
        ({"budget": 0.6, "table": "nowhere"}, "nowhere: no such file"),
        ({"budget": 0.6, "plan": full_plan(lone, "ddim", 4, 1.5)}, "expected a plan, or a budget"),
        ({"table": table}, "expected a plan, or a budget"),
        ({"budget": 2.0, "table": table}, "--budget 2"),
        ({"budget": 0.6, "table": table, "cfg_scale": 4.0}, "guidance scale"),
    ):
        with pytest.raises(InputError, match=message):
            sample(lone, LABELS, **options)
    with pytest.raises(InputError, match="backbone"):
        sample(make_model(layers=(2, 4), seed=9), LABELS, budget=0.6, table=table)


def test_samples_are_saved_as_the_command_line_saves_them(model: DynamicDepth, tmp_path: Path) -> None:
    drawn = sample(model, LABELS, num_steps=2, stats=True)
    assert drawn.save(tmp_path / "python") == tmp_path / "python"
    drawn.save(tmp_path / "python")  # the same pictures again are no other run
    sample_into(tmp_path / "disk", model, LABELS, len(LABELS), num_steps=2, stats=True)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("python", "disk")]
    assert names[0] == names[1]
    assert torch.equal(read_pictures(tmp_path / "python"), drawn.pictures)
    assert torch.equal(read_pictures(tmp_path / "disk"), drawn.pictures)
    found = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("python", "disk")]
    assert found[0]["settings"] == found[1]["settings"]
    assert found[0].keys() == found[1].keys()
    assert found[0]["complete"] is True
    with pytest.raises(InputError, match="holds another run"):
        sample(model, LABELS, num_steps=2, seed=1).save(tmp_path / "python")


def test_later_pictures_keep_their_numbers(model: DynamicDepth, tmp_path: Path) -> None:
    folder = sample(model, LABELS, num_steps=2, first_index=7).save(tmp_path / "set")
    assert sorted(path.name for path in folder.glob("0*.png"))[0] == "000007-class3.png"
    assert json.loads((folder / "manifest.json").read_text())["settings"]["first_index"] == 7


def test_pictures_for_pillow(model: DynamicDepth) -> None:
    drawn = sample(model, LABELS, num_steps=2)
    assert len(drawn.images) == len(LABELS)
    assert np.array_equal(np.asarray(drawn.images[2]), drawn.pictures[2, 0].numpy())
    assert isinstance(drawn.grid(), Image.Image)


def test_two_sets_of_one_seed_stand_side_by_side(model: DynamicDepth) -> None:
    full, fast = (sample(model, LABELS, num_steps=2, plan=plan) for plan in (None, lambda f, d: ramp(f, d, 2)))
    image = full.beside(fast)
    assert isinstance(image, Image.Image)
    pixels = np.asarray(image)
    assert {tuple(pixels[0, 0]), tuple(pixels[-1, -1])} == {(255, 255, 255)}
    with pytest.raises(InputError, match="seed 1, expected 0"):
        full.beside(sample(model, LABELS, num_steps=2, seed=1))
    with pytest.raises(InputError, match="labels"):
        full.beside(sample(model, LABELS[::-1], num_steps=2))
    with pytest.raises(InputError, match="first_index 4, expected None"):
        full.beside(sample(model, LABELS, num_steps=2, first_index=4))


def test_rows_hold_the_pictures_in_turn() -> None:
    """Three pictures in columns of two: two rows of each set, the last filled up with white."""
    black, grey = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.full((3, 1, 8, 8), 90, dtype=torch.uint8)
    pixels = np.asarray(in_rows({"a": black, "b": grey}, columns=2).convert("L"))
    middle = pixels.shape[1] - 6 * 21  # of the last column: 4 and 2 of the pixels that stand 21 wide
    shades = [int(np.median(row)) for row in np.array_split(pixels[:, middle], 4)]
    assert shades == [0, 90, 255, 255]
    for sets in ({}, {"a": black[:0]}, {"a": black, "b": grey[:2]}):
        with pytest.raises(InputError, match="pictures"):
            in_rows(sets)
    clips = torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)
    assert in_rows({"a": clips, "b": clips}).height > in_rows({"a": clips}).height


def test_latents_are_decoded_at_call_time(make_model) -> None:
    model = make_model()
    model.pixel_space = False
    drawn = sample(model, LABELS, num_steps=2)
    assert repr(drawn).startswith("Samples(4 latents 1x8x8, full, ddim, 2 steps, 100% of the blocks, seed 0, ")
    assert drawn._repr_png_() is None
    with pytest.raises(InputError, match="to_pictures"):
        drawn.images  # noqa: B018
    decoded = sample(model, LABELS, num_steps=2, to_pictures=lambda z: (z > 0).to(torch.uint8))
    assert torch.equal(decoded.pictures, (decoded.latents > 0).to(torch.uint8))


def test_what_a_cell_shows_is_short(model: DynamicDepth, table: ShiftTable) -> None:
    """No tensors: a line each, and in a notebook a picture or the plan's steps."""
    drawn = sample(model, LABELS, num_steps=2)
    plan = DepthPlan.full((10, 5), 6, "ddim", 1.5)
    for shown, start in (
        (drawn, "Samples(4 pictures 1x8x8, full, ddim, 2 steps, 100% of the blocks, seed 0, "),
        (plan, "DepthPlan(full, ddim, 2 steps, 100% of the blocks)"),
        (table, "ShiftTable(2 bands, 2 choices, 40 pictures, toy, ddim, 2 steps, guidance 1.5, times of cpu)"),
        (table.base, "Moments(3 features, 40 pictures)"),
        (model, "DynamicDepth(ClassConditionalDiT, 6 blocks of width 24, exits after 2, 4, ddpm, 1x8x8)"),
    ):
        assert repr(shown).startswith(start)
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 200
    assert drawn._repr_png_().startswith(b"\x89PNG")
    assert plan._repr_html_() == f"<pre>{plan}</pre>"
    assert isinstance(table.base, Moments)
