"""Collect the peers: the alternatives to dynamic depth. To add a peer, add one file here; it is found by itself.

All peers run on the same weights, solver, guidance and sampling loop; see `base`.
"""

from functools import cache

from dyndit.analysis.compare.peers.base import Peer, PeerContext, PeerSettings, grid
from dyndit.discovery import subclasses_in

__all__ = ["Peer", "PeerContext", "PeerSettings", "grid", "peers"]


@cache
def peers() -> dict[str, type[PeerSettings]]:
    """Return every peer of this package by name. A peer without its library raises only when its model is made."""
    found = subclasses_in(__name__, __path__, PeerSettings)
    return {settings.name: settings for settings in found if "name" in vars(settings)}
