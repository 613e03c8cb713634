"""The first pictures of a set, every class in turn."""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

from dyndit.errors import InputError
from dyndit.training.data import Pictures


class Some(Pictures):
    """The first `num` pictures of a set, every class in turn as far as it has pictures.

    Raises InputError if the set has fewer pictures.
    """

    def __init__(self, source: Pictures, num: int):
        if not 1 <= num <= len(source):
            raise InputError(f"data: asked for {num} pictures, found {len(source)}")
        of_class = [[i for i, y in enumerate(source.labels) if y == k] for k in range(source.num_classes)]
        rounds = zip_longest(*of_class)
        self.source, self._indices = source, [i for each in rounds for i in each if i is not None][:num]
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.channels, self.image_size, self.can_flip = source.channels, source.image_size, source.can_flip
        self.labels = [source.labels[i] for i in self._indices]
        places = {number: place for place, number in enumerate(self._indices)}
        kept = (tuple(places[i] for i in group if i in places) for group in source.groups)
        self.groups = tuple(group for group in kept if group)
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {num}".encode()).hexdigest()
        self.account = source.account

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[self._indices[index]]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Pictures`."""
        return self.source.shapes

    @property
    def captions(self) -> list[str]:
        """See `Pictures`."""
        captions = self.source.captions
        return [captions[i] for i in self._indices]

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        """See `Pictures`."""
        wanted = range(len(self)) if indices is None else indices
        return self.source.uint8([self._indices[i] for i in wanted])
