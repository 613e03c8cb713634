"""Read ids of models on the Hugging Face hub: `org/name` or `org/name@revision`."""

import re
from dataclasses import dataclass

from dyndit.errors import CheckpointError

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


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
