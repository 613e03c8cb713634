"""Fetch models from the Hugging Face hub into its cache, and upload native folders.

An id is `org/name` or `org/name@revision`. Only a model's own files are fetched, and pickled weights only if there are
no safetensors.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dyndit.errors import CheckpointError, first_line
from dyndit.files import sha256
from dyndit.storage.hub_id import HubId, parse

__all__ = ["HubId", "fetch", "fetch_autoencoder", "parse", "upload"]

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ("*.json", "runs.csv")
_CONFIG = "config.json"
_DIFFUSERS_SAFE = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
_SAFE = (
    "model.safetensors",
    "exits.safetensors",
    "shift-table.safetensors",
    *_DIFFUSERS_SAFE,
    "text_embedder.safetensors",
)
_PICKLED = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model-*-of-*.bin")


def fetch(model: HubId) -> tuple[Path, tuple[str, ...]]:
    """Download, or find in the cache -> the snapshot's folder, and a note on the commit if no commit was pinned.

    Raises CheckpointError: no such model or revision, or no connection and nothing in the cache.
    """
    folder = _snapshot(model, (*_SMALL, *_SAFE))
    # Look for the weights: exits or a table may lie beside a pickled backbone.
    if not any(any(folder.rglob(name)) for name in ("model.safetensors", "diffusion_pytorch_model*.safetensors")):
        pinned = replace(model, revision=folder.name) if _COMMIT.fullmatch(folder.name) else model  # of the same commit
        folder = _snapshot(pinned, (*_SMALL, *_SAFE, *_PICKLED))
    check_hashes(folder)
    commit = folder.name
    if model.revision is not None and _COMMIT.fullmatch(model.revision):
        return folder, ()
    return folder, (f"{model}: {model.revision or 'main'} is commit {commit} now; pin it as {model.name}@{commit}",)


def check_hashes(folder: Path) -> None:
    """Compare a snapshot's files with the hashes that the hub names them by in its cache.

    A large file's name there is its SHA-256, a small file's the SHA-1 that git gives it. Files that are no links, as on
    systems without links, have no such name.

    Raises CheckpointError: a file has other content.
    """
    for path in sorted(folder.rglob("*")):
        name = path.resolve().name
        if not path.is_symlink() or not _BLOB.fullmatch(name):
            continue
        if len(name) == 64:
            found = sha256(path)
        else:
            content = path.read_bytes()
            found = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
        if found != name:
            raise CheckpointError(
                f"{path}: damaged (hash {found:.12}, fetched as {name:.12}); expected it fetched anew"
            )


def fetch_autoencoder(model: HubId) -> Path:
    """Download, or find in the cache, an autoencoder, or the autoencoder of a pipeline -> the snapshot's folder.

    Raises CheckpointError: as `fetch`.
    """
    folder = _snapshot(model, (_CONFIG, *_DIFFUSERS_SAFE), "vae")
    if not any(folder.rglob("diffusion_pytorch_model*.safetensors")):
        folder = _snapshot(model, (_CONFIG, *_PICKLED), "vae")
    check_hashes(folder)
    return folder


def upload(folder: Path, repo_id: str, patterns: tuple[str, ...], **options: Any) -> str:
    """Make the repository if needed, and upload matching files of a folder -> the address of the commit.

    options: private, token, revision, commit_message, create_pr, as in `huggingface_hub.HfApi`.

    Raises CheckpointError: the hub refuses, or there is no connection.
    """
    from huggingface_hub import HfApi

    private = options.pop("private", None)
    options.setdefault("commit_message", "Upload a dyndit model")
    api = HfApi(token=options.pop("token", None))
    try:
        # The hub adds the organisation to a name without one.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=list(patterns), **options)
    except Exception as error:  # a request fails in many ways
        raise CheckpointError(f"{repo_id}: the hub refuses ({_reason(error)})") from error
    return str(commit)


def _snapshot(model: HubId, patterns: tuple[str, ...], subfolder: str = "transformer") -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*patterns, *(f"{subfolder}/{pattern}" for pattern in patterns)]
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # a request fails in many ways
        raise CheckpointError(
            f"{model}: no such file or folder here, and the hub does not give it ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
