"""The interface by which a model is saved and loaded, so that file formats can import the model, not the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

OPTIONS_OF_DIFFUSERS = {
    *("device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage", "disable_mmap"),
    *("variant", "use_safetensors", "use_flashpack", "quantization_config", "cached_folder", "cache_dir", "token"),
    *("provider", "sess_options", "provider_options", "local_files_only", "force_download", "proxies", "subfolder"),
}
"""Options that `DiffusionPipeline.from_pretrained` passes to every component, used or not."""


class Storage(Protocol):
    """Saves and loads models, each a `DynamicDepth`.

    `dyndit.storage.pretrained` implements it and sets `DynamicDepth.storage`. The model imports no file format, so that
    file formats can import the model.
    """

    def save(self, model: Any, folder: Path, **options: Any) -> None:
        """See `DynamicDepth.save_pretrained`."""

    def load(self, path_or_hub_id: str | Path, **options: Any) -> Any:
        """See `DynamicDepth.from_pretrained`."""
        ...

    def push(self, model: Any, repo_id: str, **options: Any) -> str:
        """See `DynamicDepth.push_to_hub`."""
        ...
