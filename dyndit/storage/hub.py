"""Fetch models from the Hugging Face hub into its cache, and upload native folders.

An id is `org/name` or `org/name@revision`. Only a model's own files are fetched, and pickled weights only if there are
no safetensors.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from dyndit.errors import CheckpointError, first_line

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
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


@dataclass(frozen=True)
class HubId:
    """A model on the hub. revision: branch, tag or commit; None is main."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse(text: str, revision: str | None = None) -> HubId | None:
    """Parse `org/name` or `org/name@revision`. Any other text gives None.

    Raises CheckpointError: `revision` and the id name different revisions.
    """
    match = _ID.fullmatch(text)
    if match is None or ".." in text:
        return None
    if revision is not None and match["revision"] not in (None, revision):
        raise CheckpointError(f"{text}: names a revision, but --revision {revision} is asked for")
    return HubId(match["id"], match["revision"] or revision)


def fetch(model: HubId) -> tuple[Path, tuple[str, ...]]:
    """Download, or find in the cache -> the snapshot's folder, and a note on the commit if no commit was pinned.

    Raises CheckpointError: no such model or revision, or no connection and nothing in the cache.
    """
    folder = _snapshot(model, (*_SMALL, *_SAFE))
    # Look for the weights: exits or a table may lie beside a pickled backbone.
    if not any(any(folder.rglob(name)) for name in ("model.safetensors", "diffusion_pytorch_model*.safetensors")):
        folder = _snapshot(model, (*_SMALL, *_SAFE, *_PICKLED))
    commit = folder.name
    if model.revision is not None and _COMMIT.fullmatch(model.revision):
        return folder, ()
    return folder, (f"{model}: {model.revision or 'main'} is commit {commit} now; pin it as {model.name}@{commit}",)


def fetch_autoencoder(model: HubId) -> Path:
    """Download, or find in the cache, an autoencoder, or the autoencoder of a pipeline -> the snapshot's folder.

    Raises CheckpointError: as `fetch`.
    """
    folder = _snapshot(model, (_CONFIG, *_DIFFUSERS_SAFE), "vae")
    if not any(folder.rglob("diffusion_pytorch_model*.safetensors")):
        folder = _snapshot(model, (_CONFIG, *_PICKLED), "vae")
    return folder


def upload(folder: Path, repo_id: str, patterns: tuple[str, ...], **options: object) -> str:
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
