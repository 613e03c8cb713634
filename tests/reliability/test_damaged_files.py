"""Damaged and edited files: noticed, or provably harmless."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import dyndit
from dyndit import manifest, sealed_csv
from dyndit.analysis.compare.costs import note
from dyndit.analysis.compare.evolution import Measurements
from dyndit.analysis.compare.peers.confidence import Thresholds
from dyndit.analysis.metrics import features
from dyndit.analysis.metrics.sets import Statistics, read_set, save_statistics
from dyndit.analysis.report import strips
from dyndit.analysis.report.runs import append_run, read_runs
from dyndit.analysis.report.verify import verify
from dyndit.analysis.report.write import write_report
from dyndit.errors import InputError, PlanError
from dyndit.files import read_json, write_json, write_npz
from dyndit.models.dit import DiTConfig
from dyndit.models.identity import tensors_hash
from dyndit.pictures.collection import read_picture
from dyndit.plans.plan import DepthPlan, bind
from dyndit.plans.table import ShiftTable
from dyndit.sampling.loop import full_plan
from dyndit.storage import diffusers_folder, official, reading
from dyndit.storage import load as checkpoints
from dyndit.training.checkpoints import _read_checkpoint
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.latents import encode_latents
from dyndit.training.recorded import RecordedCalls, record_sampling
from dyndit.training.subset import Some
from dyndit.training.train import Train
from support.autoencoders import make_autoencoder
from support.damage import FULL, cuts, edited, flips, unnoticed
from support.runs import frame, run_row
from support.tables import random_table

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs/results/cifar10/plans/plan-unipc-10-b0.45.json"


def content(model: dyndit.DynamicDepth) -> tuple:
    """All that a loaded model is."""
    layers = () if model.exits is None else (model.exits.layers, model.exits.config)
    return tensors_hash(model.state_dict()), model.backbone.config(), model.pixel_space, model.process, layers


def as_data(table: ShiftTable) -> tuple:
    tensors = {"mean": table.mean, "second": table.second, "base": table.base.second, "real": table.reference.second}
    plain = {k: v for k, v in vars(table).items() if not isinstance(v, torch.Tensor) and k not in ("base", "reference")}
    return tensors_hash(tensors), str(plain), table.base.num


def of_plan(path: Path) -> object:
    """A plan without a checksum says so in its note: the damage is declared."""
    plan = DepthPlan.load(path)
    return "declared" if plan.note or plan.router == "manual" else (plan, plan.figures)


def of_report(folder: Path) -> str:
    wrong = verify(folder)
    if wrong:
        raise InputError("noticed")
    return "as it was"


KINDS = (
    "plan", "plan-1", "manual", "table", "config", "weights", "exits", "pt", "diffusers", "diffusers-config", "call",
    "manifest", "runs", "report", "figure", "archive", "statistics", "picture", "features", "exit-errors", "trainings",
    "strip", "thresholds", "evolution", "state", "checkpoint", "averages", "optimizer", "log", "latents",
    "latents-index",
)  # fmt: skip
JSON = (
    "plan", "plan-1", "config", "diffusers-config", "manifest", "report", "figure", "thresholds", "evolution", "state",
    "latents-index",
)  # fmt: skip
SLOW = () if FULL else ("report", "figure", "diffusers", "latents", "latents-index")
"""Kinds that are damaged a fifth as often, unless `FULL`: verifying, building and encoding take their time."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, make_model) -> dict[str, tuple[Path, Callable[[], object]]]:
    """A file of each kind, and what its reader makes of it."""
    root = tmp_path_factory.mktemp("kinds")
    model = make_model(num_blocks=3, width=8, num_heads=2)
    plan = replace(full_plan(model, "ddim", 3, 1.5), budget=0.5, backbone="aa", exits="bb", figures={"x": 0.5})
    plan.save(root / "plan.json")
    (root / "plan-1.json").write_bytes(PUBLISHED.read_bytes())
    replace(plan, router="manual").save(root / "manual.json")
    random_table(2, 3, seed=1).save(root / "table.safetensors")
    checkpoints.save(model, root / "model")
    official.write(model, root / "model.pt")
    diffusers_folder.write(model, root / "diffusers")
    record_sampling(model, [1, 2], root / "calls", num_steps=1, cfg_scale=1.5)
    write_json(root / "manifest.json", manifest.describe({"verb": "x", "margin": 0.05}, seconds=1.5))
    runs = root / "runs"
    rows = frame(ms=5.0, fd=12.0, noise=0.05, num_blocks=2).astype(object)
    append_run(runs / "runs.csv", *rows.where(rows.notna(), None).to_dict("records"))
    write_report(runs, root / "report")
    noise = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8).numpy()
    write_npz(root / "set.npz", {"arr_0": noise})
    save_statistics(root / "statistics.npz", Statistics(random_table(1, 2, seed=0).base, num=64))
    Image.fromarray(noise[0]).save(root / "picture.png")
    features._write(root / "features.safetensors", {"features": torch.randn(3, 4)})
    call, cache = root / "calls" / "call-000000.safetensors", root / "features.safetensors"

    def of_call() -> object:
        calls = RecordedCalls(call.parent)
        shared = (calls.family, calls.backbone, calls._labels)
        return shared, [tensors_hash({"x": x, **rows}) for x, rows in (calls[i] for i in range(len(calls)))]

    def of_features() -> object:
        found = features._read(cache, ("features",))
        if found is None:  # computed again
            raise InputError("noticed")
        return tensors_hash(found)

    def of_statistics() -> object:
        found = read_set(root / "statistics.npz", "").statistics
        return tensors_hash({"mean": found.features.mean, "second": found.features.second}), found.num, found.extractor

    def of_picture() -> object:
        return hashlib.sha256(read_picture(root / "picture.png").tobytes()).hexdigest()

    native, foreign = root / "model", root / "diffusers"
    table = pd.DataFrame({"depth": [1, 2], "band": [0, 0], "noise_error": [0.25, 0.5]})
    sealed_csv.write(root / "exit-errors.csv", table)
    note(root / "trainings.csv", {"name": "exits", "seed": 0, "seconds": 7.5})
    strips.save(root, "full-10", 0, torch.from_numpy(noise).movedim(-1, 1))
    Thresholds((1, 2, 3), (900.0, 500.0, 0.0), ((0.5, 0.25), (0.125, 0.0))).save(root / "thresholds.json")
    strip = root / "strips" / "full-10-s0.safetensors"
    Measurements.open(root / "evolution.json", "key").fitness(("both", "hold"), lambda _: 0.5)
    Train(DiTConfig(8, 4, 1, width=8, num_blocks=1, num_heads=1, num_classes=10), FitConfig(1, 2), "digits").run(
        load_digits(), root / "run"
    )
    (place,) = (root / "run" / "checkpoints").iterdir()
    vae, latents = make_autoencoder(root / "vae"), root / "latents"

    def of_strip() -> object:
        found = strips._read(strip)
        if found is None:  # left out of a figure
            raise InputError("noticed")
        return found.tolist()

    def of_evolution() -> object:
        known = Measurements.open(root / "evolution.json", "key").known
        if not known:  # measured again
            raise InputError("noticed")
        return {genome: value for genome, (value, _) in known.items()}

    def of_checkpoint() -> object:
        state, tensors, log = _read_checkpoint(place)
        return state, {name: tensors_hash(weights) for name, weights in tensors.items()}, log

    def of_latents() -> object:
        """Encode, or find encoded: damaged shards are encoded again, to the same latents."""
        found = encode_latents(Some(load_digits(), 3), vae, latents, batch_size=3, device="cpu", progress=False)
        return tensors_hash({str(i): found[i][0] for i in range(3)}), [found[i][1] for i in range(3)]

    of_latents()
    return {
        "exit-errors": (root / "exit-errors.csv", lambda: sealed_csv.read(root / "exit-errors.csv", table).to_csv()),
        "trainings": (root / "trainings.csv", lambda: sealed_csv.read(root / "trainings.csv", ("seconds",)).to_csv()),
        "strip": (strip, of_strip),
        "thresholds": (root / "thresholds.json", lambda: Thresholds.load(root / "thresholds.json")),
        "evolution": (root / "evolution.json", of_evolution),
        "state": (place / "state.json", of_checkpoint),
        "checkpoint": (place / "model.safetensors", of_checkpoint),
        "averages": (place / "ema.safetensors", of_checkpoint),
        "optimizer": (place / "optimizer.safetensors", of_checkpoint),
        "log": (place / "losses.csv", of_checkpoint),
        "latents": (latents / "shard-00000-of-00001.safetensors", of_latents),
        "latents-index": (latents / "latents.json", of_latents),
        "plan": (root / "plan.json", lambda: of_plan(root / "plan.json")),
        "plan-1": (root / "plan-1.json", lambda: of_plan(root / "plan-1.json")),
        "manual": (root / "manual.json", lambda: of_plan(root / "manual.json")),
        "table": (root / "table.safetensors", lambda: as_data(ShiftTable.load(root / "table.safetensors"))),
        "config": (native / "config.json", lambda: content(checkpoints.load(native))),
        "weights": (native / "model.safetensors", lambda: content(checkpoints.load(native))),
        "exits": (native / "exits.safetensors", lambda: content(checkpoints.load(native))),
        "pt": (root / "model.pt", lambda: content(checkpoints.load(root / "model.pt"))),
        "diffusers": (foreign / "diffusion_pytorch_model.safetensors", lambda: content(checkpoints.load(foreign))),
        "diffusers-config": (foreign / "config.json", lambda: content(checkpoints.load(foreign))),
        "call": (call, of_call),
        "manifest": (root / "manifest.json", lambda: of_manifest(root / "manifest.json")),
        "runs": (runs / "runs.csv", lambda: read_runs(runs / "runs.csv").to_csv()),
        "report": (root / "report" / "report.json", lambda: of_report(root / "report")),
        "figure": (root / "report" / "frontier.manifest.json", lambda: of_report(root / "report")),
        "archive": (root / "set.npz", lambda: read_set(root / "set.npz", "").pictures.tolist()),
        "statistics": (root / "statistics.npz", of_statistics),
        "picture": (root / "picture.png", of_picture),
        "features": (cache, of_features),
    }


def of_manifest(path: Path) -> object:
    found = manifest.read(path)
    return "declared" if not manifest.is_sealed(found) else found


@pytest.mark.reliability(
    "100 flipped bits and 50 truncations of every kind of file (of slow kinds a fifth; `make torture`: all): "
    "noticed, or what is read is equal"
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_flip_and_no_cut_is_silent(kind: str, kinds: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = kinds[kind]
    monkeypatch.setattr(reading, "tried_in_child", lambda *_: None)  # it takes its time, and has tests of its own
    whole, num = path.read_bytes(), 20 if kind in SLOW else 100
    assert not unnoticed(path, flips(whole, num, seed=KINDS.index(kind)), read)
    assert not unnoticed(path, cuts(whole, num // 2, seed=1), read)


@pytest.mark.reliability(
    "Every field of every JSON file (of slow kinds some; `make torture`: all), edited, removed or added: refused, or "
    "declared as unchecked"
)
@pytest.mark.parametrize("kind", JSON)
def test_no_edit_is_silent(kind: str, kinds: dict) -> None:
    path, read = kinds[kind]
    if kind in SLOW:
        some = list(edited(path))
        damaged = iter(some[:: max(1, len(some) // 25)])
    else:
        damaged = edited(path)
    assert [line for line in unnoticed(path, damaged, read) if "declared" not in line] == []


# Plans by hand.


@pytest.mark.reliability(
    "A plan edited by hand is refused, unless by `dyndit plan edit` or router 'manual', which say so"
)
def test_a_plan_by_hand_says_so(make_model, tmp_path: Path, capsys) -> None:
    model, path = make_model(num_blocks=3), tmp_path / "plan.json"
    plan = replace(full_plan(model, "ddim", 3, 1.5), router="searched", budget=0.5, figures={"predicted_fd": 1.0})
    plan = replace(plan, backbone=model.identity.backbone, exits=model.identity.exits)
    plan.save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"steps": ["3|3", "2|1", "3|3"]}))
    with pytest.raises(PlanError, match="damaged or edited"):
        DepthPlan.load(path)
    path.write_text(json.dumps(data | {"steps": ["3|3", "2|1", "3|3"], "router": "manual"}))
    by_hand = bind(DepthPlan.load(path), model)
    assert (by_hand.router, by_hand.budget, by_hand.figures) == ("manual", None, {})
    plan.save(path)
    dyndit_cli(["plan", "edit", str(path), "--out", str(tmp_path / "new.json"), "--step", "1=2|1"])
    assert DepthPlan.load(tmp_path / "new.json") == by_hand
    assert "manual" in capsys.readouterr().out
    with pytest.raises(PlanError, match="made for backbone"):  # still bound
        bind(by_hand, make_model(num_blocks=3, seed=9))


@pytest.mark.reliability("A plan of version 1 that names no model does not run on any model unasked")
def test_a_plan_that_names_no_model_is_asked_for(make_model, tmp_path: Path) -> None:
    model, path = make_model(num_blocks=3), tmp_path / "plan.json"
    old = {"format": "dyndit-plan", "version": 1, "timesteps": [9, 1], "cond": [1, 2], "uncond": [0, 0]}
    path.write_text(json.dumps(old | {"num_blocks": 3, "solver": "ddim", "trunk": "", "exits": ""}))
    plan = DepthPlan.load(path)
    with pytest.raises(PlanError, match="no backbone"):
        bind(plan, model)
    assert bind(plan, model, check_identity=False) is plan
    dyndit_cli(["plan", "edit", str(path), "--out", str(tmp_path / "new.json")])
    assert bind(DepthPlan.load(tmp_path / "new.json"), model).router == "manual"


def test_published_plans_are_declared_as_unchecked() -> None:
    plan = DepthPlan.load(PUBLISHED)
    assert plan.note == "version 1: no checksum"
    assert plan.note in str(plan)


def test_runs_without_a_checksum_stay_readable_and_say_so(tmp_path: Path, capsys) -> None:
    frame(ms=5.0, fd=12.0).to_csv(tmp_path / "runs.csv", index=False)
    append_run(tmp_path / "runs.csv", run_row(arm="new", block=0))
    assert len(read_runs(tmp_path)) == 21
    write_report(tmp_path, tmp_path / "report")
    assert read_json(tmp_path / "report" / "report.json")["sources"][0]["checksum"] == "none: not checked"


def dyndit_cli(arguments: list[str]) -> None:
    from dyndit.cli import main

    main(arguments)


def test_every_kind_is_read(kinds: dict) -> None:
    """Guard: each reader takes its undamaged file, and tells another content from it."""
    assert set(kinds) == set(KINDS)
    for path, read in kinds.values():
        assert path.is_file()
        assert read() == read()
