"""Store models for `DynamicDepth.save_pretrained` and `from_pretrained`, in native folders and on the hub."""

from pathlib import Path
from typing import Any

from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import card
from dyndit.storage import load as checkpoints

__all__ = ["DynamicDepth", "NativeStorage"]


class NativeStorage:
    """Native folders with a model card."""

    load, push = staticmethod(checkpoints.load), staticmethod(checkpoints.push_model)

    def save(
        self,
        model: DynamicDepth,
        folder: Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        license: str | None = None,
        **hub: Any,
    ) -> None:
        """See `DynamicDepth.save_pretrained`."""
        checkpoints.save(model, folder)
        card.write(model, folder, license=license)
        model.folder = Path(folder)
        if push_to_hub:
            checkpoints.push(folder, repo_id or folder.name, **hub)


DynamicDepth.storage = NativeStorage()
