"""Collect the peers: the alternatives to dynamic depth. To add a peer, add one file here; it is found by itself.

All peers run on the same weights, solver, guidance and sampling loop; see `base`.
"""

import importlib
import pkgutil
from functools import cache

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings, grid

__all__ = ["Peer", "PeerContext", "PeerSettings", "grid", "peers"]


@cache
def peers() -> dict[str, type[PeerSettings]]:
    """Return every peer of this package by name. A peer without its library raises only when its model is made."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {settings.name: settings for settings in _concrete(PeerSettings)}


def _concrete(base: type[PeerSettings]) -> list[type[PeerSettings]]:
    found = [s for sub in base.__subclasses__() for s in (sub, *_concrete(sub))]
    return [s for s in found if "name" in vars(s) and s.__module__.startswith(__name__)]
