"""`dyndit inspect` says what anything is, what is loaded, what is ignored, what is missing, and why it is refused."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dyndit
from dyndit import files
from dyndit.cli import main
from dyndit.errors import InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import inspect as registry
from dyndit.storage import load as checkpoints
from dyndit.storage.inspect import Description
from dyndit.storage.kinds import describe
from support.autoencoders import make_autoencoder
from support.models import TINY
from support.tables import random_table


def said(path: object, capsys, *more: str, status: int = 0) -> dict[str, object]:
    """What the verb says as JSON, after checking that its text says the same."""
    for json_flag in ((), ("--json",)):
        if status:
            with pytest.raises(SystemExit) as stop:
                main(["inspect", str(path), *more, *json_flag])
            assert stop.value.code == status
        else:
            main(["inspect", str(path), *more, *json_flag])
        if not json_flag:
            text = capsys.readouterr().out
    found = json.loads(capsys.readouterr().out)
    for title in ("loaded", "ignored", "missing", "notes"):
        assert all(f"{title}: {line}" in text for line in found[title])
    assert text.startswith(found["kind"])
    return found


def test_a_training_checkpoint(tmp_path: Path, capsys) -> None:
    weights = ClassConditionalDiT(replace(TINY, width=64, num_heads=1, in_channels=4)).state_dict()
    more = {"projectors.0.weight": torch.ones(3)}
    args = argparse.Namespace(num_classes=10, path_type="Linear", prediction="velocity")
    data = {"model": {n: t + 1 for n, t in weights.items()}, "ema": weights | more, "opt": {"state": {}}, "args": args}
    torch.save(data, tmp_path / "dit.pt")
    found = said(tmp_path / "dit.pt", capsys)
    assert found["kind"] == "SiT checkpoint"
    assert found["facts"].items() >= {"process": "flow", "width": 64, "num_blocks": 6, "makes": "latents"}.items()
    assert found["loaded"][0].startswith(f"backbone: {len(weights)} tensors, ")
    assert found["ignored"] == [f"model ({len(weights)} tensors)", "opt", "projectors.* (1 tensors)"]
    assert [line.partition(":")[0] for line in found["missing"]] == ["exits", "autoencoder"]
    assert any("using 'ema'; 'model' differs, --weights model takes it" in note for note in found["notes"])
    taken = said(tmp_path / "dit.pt", capsys, "--weights", "model")
    assert taken["facts"]["hash"] != found["facts"]["hash"]


def test_a_model_folder_with_its_companions(model: DynamicDepth, tmp_path: Path, capsys) -> None:
    checkpoints.save(model, tmp_path)
    dyndit.DepthPlan.full((999, 500), 6, "ddim").save(tmp_path / "plan-full.json")
    found = said(tmp_path, capsys)
    assert found["kind"] == "native folder"
    assert [line.partition(":")[0] for line in found["loaded"]] == ["backbone", "exits", "plan"]
    assert [line.partition(":")[0] for line in found["missing"]] == ["shift table"]
    random_table(3, 5, seed=0).save(tmp_path / checkpoints.TABLE)
    found = said(tmp_path, capsys)
    assert found["loaded"][-1] == f"shift table: {checkpoints.TABLE}"
    assert (found["missing"], found["problem"]) == ([], "")
    assert said("digits", capsys)["kind"] == "packaged model"


def test_files_and_folders_beside_models(model: DynamicDepth, tmp_path: Path, capsys) -> None:
    checkpoints.save(model, tmp_path / "native")
    dyndit.DepthPlan.full((999, 500), 6, "ddim").save(tmp_path / "plan.json")
    random_table(3, 5, seed=0).save(tmp_path / "table.safetensors")
    make_autoencoder(tmp_path / "vae")
    files.write_json(tmp_path / "run" / "manifest.json", {"settings": {"verb": "sample"}, "complete": False})
    made_from = {"vae_sha256": "a", "num_pictures": 3}
    files.write_json(tmp_path / "cache" / "latents.json", {"made_from": made_from, "sha256": {"shard-0": "b"}})
    plan = said(tmp_path / "plan.json", capsys)
    assert (plan["kind"], plan["facts"]["solver"], plan["facts"]["steps"]) == ("depth plan", "ddim", 2)
    assert said(tmp_path / "table.safetensors", capsys)["kind"] == "shift table"
    exits = said(tmp_path / "native" / "exits.safetensors", capsys)
    assert (exits["kind"], exits["facts"]["backbone"]) == ("exits", model.identity.backbone)
    vae = said(tmp_path / "vae", capsys)
    assert vae["facts"].items() >= {"class": "AutoencoderKL", "latent channels": 4, "scale": 0.5}.items()
    run = said(tmp_path / "run", capsys)
    assert (run["kind"], len(run["missing"])) == ("run of dyndit sample", 1)
    cache = said(tmp_path / "cache", capsys)
    assert (cache["kind"], cache["missing"]) == ("cache of latents", ["shard: shard-0"])


def test_what_is_refused_is_described_all_the_same(tmp_path: Path, capsys) -> None:
    save_file({"conv_in.weight": torch.ones(3, 2), "mid.bias": torch.ones(1)}, tmp_path / "unet.safetensors")
    found = said(tmp_path / "unet.safetensors", capsys, status=2)
    assert found["kind"] == "nothing that loads as a model"
    assert found["facts"]["holds"] == ["conv_in.* (1 tensors)", "mid.* (1 tensors)"]
    assert found["facts"]["first tensors"]["conv_in.weight"] == [3, 2]
    assert "missing 'x_embedder.proj.weight'" in found["problem"]
    (tmp_path / "broken.json").write_text("{")
    found = said(tmp_path / "broken.json", capsys, status=2)
    assert (found["kind"], "not JSON" in found["problem"]) == ("damaged JSON file", True)
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert "a Git LFS pointer to 9 bytes" in said(tmp_path / "lfs.pt", capsys, status=2)["problem"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    assert said(tmp_path / "folder", capsys, status=2)["facts"]["holds"] == ["notes.txt"]
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "none")])
    assert "no such file or folder" in capsys.readouterr().err


def test_other_packages_register_kinds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))

    @registry.kind("score sheet")
    def sheet(path: Path) -> Description | None:
        if path.suffix != ".scores":
            return None
        if not path.read_text():
            raise InputError(f"{path}: empty; expected scores")
        return Description("score sheet", {"lines": 1})

    (tmp_path / "a.scores").write_text("3")
    (tmp_path / "b.scores").write_text("")
    assert describe(tmp_path / "a.scores").lines() == ["score sheet", "  lines: 1"]
    assert describe(tmp_path / "b.scores").problem.endswith("empty; expected scores")
