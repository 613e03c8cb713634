"""Run DBCache of the package cache-dit.

If the first blocks' residual hardly changed since the last full step, the middle blocks do not run. Their residual is
reused, or forecast from the last residuals (TaylorSeer).

Source: cache-dit (github.com/vipshop/cache-dit), "DBCache"; TaylorSeer: J. Liu et al., ICCV 2025, arXiv:2503.06923.
Code: cache-dit, an optional package (`pip install "dyndit[peers]"`), through its own adapter for diffusers' DiT.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar

from dyndit.analysis.compare.peers.base import PeerContext
from dyndit.analysis.compare.peers.foreign import DiffusersCache, TransformerPeer
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth


def load_cache_dit() -> ModuleType:
    """Import cache-dit; switch off its log to standard output. Raises InputError: cache-dit is not installed."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        import cache_dit
    except ImportError as error:
        needs = f"needs the package cache-dit ({error})"
        raise InputError(f"peer {DBCache.name}: {needs}; expected pip install dyndit[peers]") from error
    return cache_dit


class DBCachePeer(TransformerPeer):
    """A peer whose state lies in the contexts of cache-dit's context manager."""

    def __init__(self, model: DynamicDepth, settings: "DBCache") -> None:
        super().__init__(model, settings)
        cache_dit = load_cache_dit()
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=settings.first,
            Bn_compute_blocks=settings.last,
            residual_diff_threshold=settings.threshold,
            max_warmup_steps=settings.warmup,
            enable_separate_cfg=False,
        )
        forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=settings.order) if settings.order else None
        cache_dit.enable_cache(self.transformer, cache_config=config, calibrator_config=forecast)
        self._manager = self.transformer._context_manager
        self._begin = [context._init_kwargs for context in self._manager._cached_context_manager.values()]

    def put(self, states: Sequence[object] | None) -> None:
        """Set the contexts; make new ones for a new sampling. `refresh_context` would empty a running sampling's."""
        self._manager._cached_context_manager = {} if states is None else states[0]
        if states is None:
            for settings in self._begin:
                self._manager.new_context(**settings)

    def take(self) -> tuple[object, ...]:
        """Return the contexts by name."""
        return (self._manager._cached_context_manager,)


@dataclass(frozen=True)
class DBCache(DiffusersCache):
    """threshold: on mean |r - r'| / mean |r'| of the first blocks' residuals; 0 never skips. order: of the forecast; 0:
    no forecast. first, last: numbers of blocks that run at every step. warmup: number of first steps that run in full.
    """

    name: ClassVar[str] = "cache-dit"
    switched_off: ClassVar = {"threshold": 0.0}
    """Never skips: no residual is below threshold 0."""
    compared: ClassVar = ((0.1,), (0.2,), (0.2, 1), (0.4, 1))
    """From some to most steps skipped, with a forecast at the two wider settings."""
    least: ClassVar = {"threshold": 0, "order": 0, "first": 1, "last": 0, "warmup": 1}
    threshold: float = 0.2
    order: int = 0
    first: int = 1
    last: int = 0
    warmup: int = 2

    @classmethod
    def available(cls) -> bool:
        """Return True if cache-dit is installed."""
        return find_spec("cache_dit") is not None

    def model(self, model: DynamicDepth, context: PeerContext | None = None) -> DynamicDepth:
        """See `DiffusersCache.model`. Raises InputError: no cache-dit, or `first` + `last` are too many blocks."""
        if self.first + self.last > model.num_blocks:
            found = f"{self.first} first and {self.last} last blocks"
            raise InputError(f"peer {self.name}: {found}, expected {model.num_blocks} at most")
        return DBCachePeer(model, self)
