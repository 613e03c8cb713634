"""Invented files: every reader succeeds, or refuses them in one line, in bounded time and memory.

`make test` tries 2,000 inputs in all, `make fuzz` 100,000.
"""

import io
import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyndit import manifest
from dyndit.analysis.metrics.sets import read_set
from dyndit.analysis.report.runs import COLUMNS, read_runs
from dyndit.errors import InputError
from dyndit.files import read_json, read_safetensors
from dyndit.plans.plan import DepthPlan
from dyndit.plans.table import ShiftTable
from dyndit.sampling.loop import full_plan
from dyndit.sampling.store import problem_of
from dyndit.seals import sealed
from dyndit.storage import load as checkpoints
from dyndit.training.recorded import RecordedCalls, record_sampling
from support.tables import random_table

INPUTS = int(os.environ.get("DYNDIT_FUZZ", "2000"))
MOST_SECONDS, MOST_MIB = 5.0, 300

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1 << 31, 1 << 63, 10**400]),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["12|6", "8|e4", "4+", "held", "ddim", "manual", "", "\x00", "../x"]),
)
VALUES = st.recursive(PLAIN, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=6), of, max_size=4))


@st.composite
def changed(draw: st.DrawFn, data: dict[str, object]) -> dict[str, object]:
    """The object with up to three fields replaced, removed or added, at most two levels down."""
    found = dict(data)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*found, "new"]))
        if draw(st.booleans()) and isinstance(found.get(name), dict) and found[name]:
            found[name] = found[name] | {draw(st.sampled_from([*found[name]])): draw(VALUES)}
        elif draw(st.integers(0, 3)) == 0:
            found.pop(name, None)
        else:
            found[name] = draw(VALUES)
    return found


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a few replaced, inserted or removed, or others altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(found), draw(st.sampled_from([64, 2000, 1 << 20]))) - 1)))
        kind = draw(st.integers(0, 2))
        if kind == 0:
            found[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 1:
            found[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            del found[at : at + draw(st.integers(1, 40))]
    return bytes(found)


def peak() -> int:
    """Most KiB of memory that this process took since the last call; 0 where there is no Linux to tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return int(found[1])


def taken(read: Callable[[], object]) -> None:
    """Read: success, or an `InputError` of one short line, in bounded time and memory."""
    peak()
    began, before = time.process_time(), peak()
    message = ""
    try:
        read()
    except InputError as error:
        message = str(error).strip()
    assert "\n" not in message
    assert len(message) < 2000
    assert time.process_time() - began < MOST_SECONDS
    assert peak() - before < MOST_MIB << 10


def as_json(data: object) -> bytes:
    return json.dumps(data).encode()


def npy(shape: tuple, descr: str, content: bytes) -> bytes:
    header = io.BytesIO()
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header.write(b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n")
    return header.getvalue() + content


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_model) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    model = make_model(num_blocks=2, width=8, num_heads=2)
    checkpoints.save(model, root / "model")
    full_plan(model, "ddim", 3, 1.5).save(root / "plan.json")
    random_table(2, 2, seed=0).save(root / "table.safetensors")
    record_sampling(model, [1], root / "calls", num_steps=1)
    (root / "samples").mkdir()
    (root / "samples" / "000000-class1.png").write_bytes(b"")
    return root


def fuzz(share: float) -> Callable:
    """Settings of a test that gets this share of all inputs. The same inputs at every run."""
    return settings(
        max_examples=max(1, int(INPUTS * share)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


PLAN = {"format": "dyndit-plan", "version": 2, "timesteps": [9, 5, 1], "steps": ["2|2", "1", "2|e1"], "num_blocks": 2}
PLAN |= {"solver": "ddim", "router": "manual", "settings": {"a": 1}, "cfg_scale": 1.5, "budget": 0.5, "figures": {}}
FIRST = {"format": "dyndit-plan", "version": 1, "timesteps": [9, 1], "cond": [1, 2], "uncond": [0, -2]}
FIRST |= {"num_blocks": 2, "solver": "ddim", "trunk": "a", "exits": "b", "cfg_scale": 1.5}


@pytest.mark.reliability("Invented plans: read, or refused in one line")
@given(data=st.one_of(changed(PLAN), changed(FIRST), changed(PLAN | {"router": "x"}).map(sealed)))
@fuzz(0.3)
def test_plans(data: dict, root: Path) -> None:
    (root / "p.json").write_bytes(as_json(data))
    taken(lambda: str(DepthPlan.load(root / "p.json")))


@pytest.mark.reliability("Invented JSON and damaged text: read, or refused in one line")
@given(content=st.one_of(damaged(as_json(PLAN)), VALUES.map(as_json), st.binary(max_size=80)))
@fuzz(0.1)
def test_json(content: bytes, root: Path) -> None:
    (root / "p.json").write_bytes(content)
    taken(lambda: DepthPlan.load(root / "p.json"))
    taken(lambda: read_json(root / "p.json"))


MANIFEST = {"settings": {"verb": "sample", "num_images": 1}, "complete": True, "date": "x"}


@pytest.mark.reliability("Invented manifests: read, or refused in one line")
@given(data=st.one_of(changed(MANIFEST), changed(MANIFEST).map(sealed)))
@fuzz(0.1)
def test_manifests(data: dict, root: Path) -> None:
    (root / "samples" / "manifest.json").write_bytes(as_json(data))
    taken(lambda: manifest.read(root / "samples" / "manifest.json"))
    taken(lambda: problem_of(root / "samples"))


@pytest.mark.reliability("Invented configs of models: read, or refused in one line, within bounds")
@given(data=st.data())
@fuzz(0.1)
def test_configs(data: st.DataObject, root: Path) -> None:
    path = root / "model" / "config.json"
    whole = path.read_bytes()
    config = json.loads(whole)
    if data.draw(st.booleans()):
        found = data.draw(changed(config))
    else:
        found = config | {"backbone": data.draw(changed(config["backbone"]))}
    path.write_bytes(as_json(found))
    try:
        taken(lambda: checkpoints.load(root / "model"))
    finally:
        path.write_bytes(whole)


@pytest.mark.reliability("Damaged tables, calls and safetensors headers: refused in one line")
@pytest.mark.parametrize("name", ["table.safetensors", "calls/call-000000.safetensors", "model/exits.safetensors"])
@given(data=st.data())
@fuzz(0.08)
def test_safetensors(name: str, data: st.DataObject, root: Path) -> None:
    path = root / name
    whole = path.read_bytes()
    content = data.draw(damaged(whole))
    if data.draw(st.booleans()):  # a header of its own
        header = as_json(data.draw(changed({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})))
        content = len(header).to_bytes(8, "little") + header + bytes(4)
    path.write_bytes(content)
    try:
        taken(lambda: read_safetensors(path))
        reader = {"t": lambda: ShiftTable.load(path), "c": lambda: RecordedCalls(path.parent)[0]}
        taken(reader.get(name[0], lambda: checkpoints.load(path.parent)))
    finally:
        path.write_bytes(whole)


@pytest.mark.reliability("Invented .npz files: read, or refused in one line, within bounds")
@given(
    shape=st.lists(st.integers(-2, 5) | st.sampled_from([1 << 40, 1 << 63]), max_size=5).map(tuple),
    descr=st.sampled_from(["|u1", "<f8", "|O", "<U3", "<c16", "|V0", "|b1", ">i4"]) | st.text(max_size=4),
    content=st.binary(max_size=200),
    name=st.sampled_from(["arr_0", "mu", "sigma", "num", "extractor", "images"]),
    cut=st.integers(0, 3),
)
@fuzz(0.1)
def test_npz(shape: tuple, descr: str, content: bytes, name: str, cut: int, root: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.npy", npy(shape, descr, content))
        plain = io.BytesIO()
        np.save(plain, np.eye(2))
        archive.writestr("sigma.npy" if name == "mu" else "mu.npy", plain.getvalue())
    (root / "a.npz").write_bytes(file.getvalue()[: -cut or None])
    taken(lambda: read_set(root / "a.npz", ""))


HEAD = ",".join(COLUMNS)


@pytest.mark.reliability("Invented rows of runs: read, or refused in one line")
@given(rows=st.lists(st.lists(st.text(max_size=5), min_size=len(COLUMNS) - 1, max_size=len(COLUMNS) + 1), max_size=3))
@fuzz(0.06)
def test_rows(rows: list[list[str]], root: Path) -> None:
    (root / "runs.csv").write_text("\n".join([HEAD, *(",".join(row) for row in rows)]), newline="")
    taken(lambda: read_runs(root / "runs.csv"))
