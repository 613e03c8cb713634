"""Store models for `DynamicDepth.save_pretrained` and `from_pretrained`, in native folders and on the hub."""

from pathlib import Path

from dyndit.models.dynamic import DynamicDepth
from dyndit.storage import card, load

__all__ = ["DynamicDepth", "NativeStorage"]


class NativeStorage:
    """Native folders with a model card."""

    def save(
        self,
        model: DynamicDepth,
        folder: Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        license: str | None = None,
        **hub: object,
    ) -> None:
        """See `DynamicDepth.save_pretrained`."""
        load.save(model, folder)
        card.write(model, folder, license=license)
        if push_to_hub:
            load.push(folder, repo_id or folder.name, **hub)

    def load(self, path_or_hub_id: str | Path, **options: object) -> DynamicDepth:
        """See `dyndit.load`."""
        return load.load(path_or_hub_id, **options)

    def push(self, model: DynamicDepth, repo_id: str, **options: object) -> str:
        """See `dyndit.storage.load.push_model`."""
        return load.push_model(model, repo_id, **options)


DynamicDepth.storage = NativeStorage()
