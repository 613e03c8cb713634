"""Files of strangers: nothing in them runs, and they take no more memory and time than allowed."""

import argparse
import functools
import io
import json
import logging
import operator
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dyndit.analysis.metrics.extractors.inception import inception
from dyndit.analysis.metrics.sets import read_set
from dyndit.analysis.report.runs import append_run
from dyndit.analysis.report.verify import verify
from dyndit.analysis.report.write import write_report
from dyndit.errors import CheckpointError, InputError
from dyndit.limits import LIMITS
from dyndit.markdown import as_plain, plain
from dyndit.pictures.arrays import headers_of
from dyndit.plans.plan import DepthPlan
from dyndit.storage import hub
from dyndit.storage import load as checkpoints
from dyndit.training.latents import load_autoencoder
from dyndit.training.recorded import RecordedCalls
from dyndit.untrusted import tried_in_child
from support.runs import frame


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Lazy:
    """Unpickled, it is `map(...)`."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return map, self.arguments


def payloads(canary: Path) -> list[bytes]:
    """Pickles that would write the file `canary`, each in its own way."""
    text = f"open({str(canary)!r}, 'w').close()"
    objects = [
        Call(exec, text),
        Call(eval, text),
        Call(os.system, f"touch {canary}"),
        Call(__import__("subprocess").call, ["touch", str(canary)]),
        Call(Path(canary).touch),
        Call(io.open, str(canary), "w"),
        Call(np.save, str(canary), [1]),
        Call(torch.save, 1, str(canary)),
        {"ema": {"weight": Call(exec, text)}},
        [Call(exec, text)],
    ]
    name = str(canary)
    objects += [
        Call(operator.call, Path(name).touch),
        Call(functools.reduce, exec, [text, {}]),
        Call(next, Lazy(open, [name], ["w"])),
        Call(operator.call, functools.partial(open, name, "w")),
        Call(shutil.copyfile, __file__, name),
        Call(logging.FileHandler, name),
        Call(np.ndarray.tofile, np.zeros(1), name),
        Call(operator.methodcaller("write_text", "x"), Path(name)),
        OrderedDict(weight=Call(exec, text)),
        argparse.Namespace(num_classes=Call(exec, text)),
    ]
    return [pickle.dumps(each) for each in objects]


def as_pt(content: bytes) -> bytes:
    """A zip as of `torch.save` with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def as_npz(content: bytes) -> bytes:
    """An .npz whose arr_0 holds this pickle."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + content)
    return file.getvalue()


READERS = {
    "model.pt": lambda path: checkpoints.load(path),
    "raw.pt": lambda path: checkpoints.load(path),
    "set.npz": lambda path: read_set(path, ""),
    "renamed.npz": lambda path: read_set(path, ""),
    "inception.pth": inception,
    "plan.json": DepthPlan.load,
    "model/config.json": lambda path: checkpoints.load(path.parent),
    "diffusers/diffusion_pytorch_model.bin": lambda path: checkpoints.load(path.parent),
    "calls/call-000000.safetensors": lambda path: RecordedCalls(path.parent),
    "vae/diffusion_pytorch_model.bin": lambda path: load_autoencoder(path.parent),
}
FORMS = {"model.pt": as_pt, "inception.pth": as_pt, "set.npz": as_npz, "diffusers/diffusion_pytorch_model.bin": as_pt}


@pytest.mark.reliability("20 malicious pickles in each of 10 places where files are read: none runs")
@pytest.mark.parametrize("name", READERS)
def test_no_payload_runs(name: str, make_model, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / name
    checkpoints.save(make_model(num_blocks=2, width=8, num_heads=2), tmp_path / "model")
    path.parent.mkdir(exist_ok=True)
    if name.startswith("diffusers"):
        (path.parent / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    if name.startswith("vae"):
        (path.parent / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    for content in payloads(canary):
        path.write_bytes(FORMS.get(name, bytes)(content))
        with pytest.raises(InputError) as found:
            READERS[name](path)
        assert "\n" not in str(found.value)
        assert not canary.exists()


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Guard: unpickled, they do write the file."""
    for k, content in enumerate(payloads(canary := tmp_path / "canary.npy")):
        pickle.loads(content)
        assert canary.exists(), k
        canary.unlink()


@pytest.fixture
def frugal():
    """Fail a test that takes 300 MiB more memory or 20 seconds."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
    assert time.process_time() - began < 20


HUGE = {
    "width": {"width": 9216},
    "blocks": {"num_blocks": 20_000},
    "picture": {"image_size": 4096, "patch_size": 2},
    "channels": {"in_channels": 1 << 19},
    "classes": {"num_classes": 1 << 20},
    "mlp": {"mlp_ratio": 1e6},
    "infinite": {"mlp_ratio": 1e400},
    "all": {"width": 1 << 20, "num_blocks": 1 << 20, "image_size": 1 << 20, "num_classes": 1 << 20},
}


@pytest.mark.reliability("Configs that ask for huge models are compared with the file before anything is built")
@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_config_is_refused_before_it_is_built(kind: str, make_model, tmp_path: Path, frugal: None) -> None:
    """Config and metadata agree, as a stranger would write them."""
    checkpoints.save(make_model(num_blocks=2, width=8, num_heads=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"] |= HUGE[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors", {"config": json.dumps(config)})
    with pytest.raises(CheckpointError):
        checkpoints.load(tmp_path)


def deflated(path: Path, name: str, head: bytes, num_bytes: int) -> None:
    """A zip with `num_bytes` of zeros after `head`, deflated a thousandfold."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w", force_zip64=True) as file:
        file.write(head)
        for _ in range(num_bytes >> 20):
            file.write(bytes(1 << 20))


def npy_header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.getvalue()


@pytest.mark.reliability("Archives that deflate a thousandfold, or declare more than they hold, are refused unread")
@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_a_deflate_bomb_is_refused(kind: str, tmp_path: Path, frugal: None) -> None:
    path = tmp_path / f"bomb.{kind}"
    head = npy_header((400 << 20, 1, 1, 1)) if kind == "npz" else b""
    deflated(path, "arr_0.npy" if kind == "npz" else "archive/data.pkl", head, 400 << 20)
    with pytest.raises(InputError, match="--max-gib"):
        read_set(path, "") if kind == "npz" else checkpoints.load(path)


@pytest.mark.parametrize("shape", [(582 << 40,), (8 << 30, 1), (-1,), (1 << 62, 1 << 62), ()])
def test_an_array_that_declares_more_than_it_holds_is_refused(shape: tuple, tmp_path: Path, frugal: None) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", npy_header(shape) + bytes(100))
    with pytest.raises(InputError, match="declares"):
        headers_of(tmp_path / "a.npz")


@pytest.mark.reliability("Tensors that repeat few bytes to a huge shape are refused")
def test_a_tensor_of_stride_0_is_refused(make_model, tmp_path: Path, frugal: None) -> None:
    state = dict(make_model(num_blocks=2, width=8, num_heads=2).backbone.state_dict())
    for shape in ((9216 * 4, 9216), (1 << 40, 1 << 10)):
        torch.save(state | {"pos_embed": torch.zeros(1).expand(1, *shape)}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match="repeats 4 bytes"):
            checkpoints.load(tmp_path / "model.pt")


@pytest.mark.reliability("A .pt is read in a child process first, with a limit on its memory")
def test_a_file_that_takes_too_much_ends_the_child_alone(tmp_path: Path, frugal: None) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match=r"takes more than 0\.25 GiB"):
        tried_in_child(path, lambda: bytearray(1 << 30), 1 << 28)
    with pytest.raises(CheckpointError, match="ends its reader"):
        tried_in_child(path, lambda: os.kill(os.getpid(), 9), 1 << 28)
    tried_in_child(path, lambda: bytearray(1 << 20), 1 << 28)
    tried_in_child(path, lambda: 1 / 0, 1 << 28)  # the caller's own reading meets it


@pytest.mark.reliability("The limit is a flag: --max-gib")
def test_the_limit_is_a_flag(make_model, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from dyndit.cli import main

    monkeypatch.setattr(LIMITS, "gib", None)
    model, path = make_model(num_blocks=2, width=8, num_heads=2), tmp_path / "model.pt"
    torch.save({"ema": model.backbone.state_dict(), "args": argparse.Namespace(num_classes=10)}, path)
    with pytest.raises(SystemExit):
        main(["convert", str(path), str(tmp_path / "out"), "--num-heads", "2", "--max-gib", "1e-7"])
    assert "--max-gib allows more" in capsys.readouterr().err
    main(["--max-gib", "1", "convert", str(path), str(tmp_path / "out"), "--num-heads", "2"])
    assert (tmp_path / "out" / "config.json").is_file()


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.reliability("JSON nested 100,000 deep, in every JSON that is read: one line")
@pytest.mark.parametrize("name", ["plan.json", "config.json", "weights", "exits", "call", "manifest.json"])
def test_deep_json_is_one_line(name: str, make_model, tmp_path: Path) -> None:
    checkpoints.save(make_model(num_blocks=2, width=8, num_heads=2), tmp_path / "model")
    folder, read = tmp_path / "model", lambda: checkpoints.load(tmp_path / "model")
    if name == "plan.json":
        (folder / "plan-x.json").write_text('{"settings": ' + DEEP + "}")
    elif name == "config.json":
        (folder / name).write_text('{"backbone": ' + DEEP + "}")
    elif name == "weights":
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"config": DEEP})
    elif name == "exits":
        save_file({"x": torch.zeros(1)}, folder / "exits.safetensors", {"config": DEEP, "format": "dyndit-exits"})
    elif name == "call":
        (tmp_path / "calls").mkdir()
        metadata = {"format": "dyndit-call", "version": "1", "call": DEEP}
        save_file({"x": torch.zeros(1)}, tmp_path / "calls" / "call-000000.safetensors", metadata)
        read = lambda: RecordedCalls(tmp_path / "calls")  # noqa: E731
    else:
        (folder / name).write_text('{"settings": ' + DEEP + "}")
        read = lambda: dyndit_manifest(folder / name)  # noqa: E731
    with pytest.raises(InputError) as found:
        read()
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500


def dyndit_manifest(path: Path) -> object:
    from dyndit import manifest

    return manifest.read(path)


NASTY = "<img src=x onerror=alert(1)> | [link](javascript:x) & `\n# heading"


@pytest.mark.reliability("Names in runs are escaped in report.md and report.html, and --verify reads them back")
def test_names_make_no_markup(tmp_path: Path) -> None:
    rows = frame(ms=5.0, fd=12.0, noise=0.05, num_blocks=3, family=NASTY, arm=NASTY).astype(object)
    rows = rows.assign(run=NASTY, machine=NASTY, model=NASTY)
    append_run(tmp_path / "run" / "runs.csv", *rows.where(rows.notna(), None).to_dict("records"))
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"settings": {NASTY: NASTY}}))
    write_report(tmp_path / "run", tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "onerror" in text
        assert "<img src=x" not in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "](javascript" not in markdown.replace("\\[link](javascript", "")
    assert "\n# heading" not in markdown
    assert verify(tmp_path / "out") == []


def test_escaping_can_be_undone() -> None:
    for text in ("a < b & c > d", "x | y", "&lt;", "[a](b)", "![a](b)", "[95%]"):
        assert as_plain(plain(text)) == text


@pytest.mark.reliability("A file of the hub's cache that does not have the hash it was fetched by is refused")
def test_a_download_is_compared_with_its_hash(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / ("a" * 40), tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    content = b"weights"
    import hashlib

    large = hashlib.sha256(content).hexdigest()
    small = hashlib.sha1(b"blob 7\0" + content).hexdigest()
    for name, blob in (("model.safetensors", large), ("config.json", small)):
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(blobs / blob)
    hub.check_hashes(snapshot)
    for name, blob in (("model.safetensors", large), ("config.json", small)):
        (blobs / blob).write_bytes(b"Weights")
        with pytest.raises(CheckpointError, match=name):
            hub.check_hashes(snapshot)
        (blobs / blob).write_bytes(content)


def test_plans_of_strangers_hold_no_huge_numbers(tmp_path: Path) -> None:
    plan = DepthPlan.full((9, 1), 2, "ddim")
    for change in ({"num_blocks": 10**400}, {"cfg_scale": 1e308}, {"settings": {"a": 10**400}}):
        data = replace(plan).to_json() | change | {"router": "manual"}
        (tmp_path / "plan.json").write_text(json.dumps(data))
        if "cfg_scale" in change:  # large, and finite
            assert DepthPlan.load(tmp_path / "plan.json").cfg_scale == 1e308
            continue
        with pytest.raises(InputError, match=r"expected a finite number|num_blocks 1|digits"):
            DepthPlan.load(tmp_path / "plan.json")
