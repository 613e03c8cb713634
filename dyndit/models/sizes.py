"""Checks that the architectures of all families share."""

from typing import Protocol

from dyndit.errors import InputError


class Sized(Protocol):
    """An architecture of pictures that are cut into square patches."""

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of a square picture, or (height, width)."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a patch."""
        ...


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a picture: 32 -> (32, 32)."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def check_sizes(config: Sized, *names: str) -> None:
    """Write a square's two sides as one number. Check that sizes are at least 1, and sides a multiple of the patch.

    names: further sizes of the config.

    Raises:
        InputError: names the size.
    """
    if not isinstance(config.image_size, int):  # JSON makes a pair a list
        height, width = config.image_size
        object.__setattr__(config, "image_size", height if height == width else (height, width))
    for name in ("patch_size", *names):
        if getattr(config, name) < 1:
            raise InputError(f"{name} {getattr(config, name)}: expected at least 1")
    for side in sides(config.image_size):
        if side < 1 or side % config.patch_size:
            raise InputError(f"image_size {side}: expected a multiple of patch_size {config.patch_size}")
