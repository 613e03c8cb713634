"""Record how a run was made, in a manifest, and keep two runs out of one folder."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch

from dyndit import files, runtime, seals
from dyndit.errors import InputError

MANIFEST = "manifest.json"
ENVIRONMENT = ("TIMM_FUSED_ATTN", "GLIBC_TUNABLES", "OMP_NUM_THREADS")
"""Variables that change how long the same arithmetic takes."""
PACKAGES = ("dyndit", "torch", "diffusers", "accelerate", "timm", "torch-fidelity", "pandas", "numpy")


def machine(device: str = "cpu") -> str:
    """Name the hardware of a device. Times are compared only under one name.

    A CPU's model alone does not tell: hosts name several generations "AMD EPYC". Its widest instructions and whether it
    multiplies in bfloat16 are part of the name.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    able = torch.backends.cpu.get_cpu_capability() + " without bf16" * runtime.emulates_bf16("cpu")
    return f"{model}, {able}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def describe(settings: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Make a manifest: the run's settings, the code, the machine, further facts, and a checksum over them all."""
    name = Path(sys.argv[0]).name
    return seals.sealed(
        {
            "settings": settings,
            "command": " ".join(["dyndit" if name == "__main__.py" else name, *sys.argv[1:]]),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "revision": _revision(),
            "machine": machine(),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **facts,
        }
    )


def read(path: Path) -> dict[str, Any]:
    """Read a manifest, and check it. An older manifest without a checksum is taken: `is_sealed` tells.

    Raises:
        CheckpointError: missing, no JSON, damaged, or edited.
    """
    found = files.read_json(path)
    seals.unsealed(path, found, needed=False)
    return found


def is_sealed(manifest: dict[str, Any]) -> bool:
    """Tell if a manifest carries a checksum, which `read` has checked."""
    return seals.SEAL in manifest


def _first_change(then: dict[str, Any], now: dict[str, Any], within: str = "") -> str | None:
    """Name the first setting that differs, with both values: "experiment.margin 0.05, now 0.03". None differs: None."""
    absent = "absent"
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name, absent), now.get(name, absent)
        if before != after:
            inner = None
            if isinstance(before, dict) and isinstance(after, dict):
                inner = _first_change(cast(dict[str, Any], before), cast(dict[str, Any], after), f"{within}{name}.")
            return inner or f"{within}{name} {before!r}, now {after!r}"
    return None


def claim(out: Path, settings: dict[str, Any], shared: tuple[str, ...] = (), **facts: Any) -> dict[str, Any] | None:
    """Make `out` the folder of a run with these settings. Return its manifest if it already holds this run.

    shared: names that may lie in the folder before the run claims it. facts: further entries of a new manifest.

    Raises:
        InputError: the folder holds another run or foreign files, or a setting is not finite.
    """
    path = out / MANIFEST
    if not path.exists():
        text = files.to_json(path, describe(settings, **facts))
        try:
            files.claim(out, shared)
        except InputError:
            if not path.exists():  # otherwise another process of this run has just claimed it
                raise
        else:
            files.write_text(path, text)
            return None
    try:
        found = read(path)
        if not is_sealed(found):
            raise InputError(f"{path}: damaged or edited (it has no checksum)")
    except InputError as error:
        raise InputError(f"{error}; expected the manifest of a run") from error
    if not isinstance(theirs := found.get("settings"), dict):
        raise InputError(f"{path}: damaged (settings {theirs!r:.40}); expected the manifest of a run")
    changed = _first_change(theirs, json.loads(json.dumps(settings, default=str)))
    if changed is not None:
        raise InputError(f"--out {out}: holds another run ({changed}); expected an empty folder or the same run")
    files.sweep(out)
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _revision() -> str:
    """Return the git revision of the checkout that the package runs from, with a mark for local changes."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if revision and git("status", "--porcelain") else "")
    except OSError:
        return ""
