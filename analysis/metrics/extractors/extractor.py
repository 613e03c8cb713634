"""Run an extractor's network on pictures, batch by batch."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from dyndit.errors import InputError
from dyndit.pictures import as_rgb
from dyndit.progress import progress_bar

T = TypeVar("T")

SPATIAL_CHANNELS = 7  # of the spatial layer, as in ADM's sFID (Nash et al. 2021)


def state_hash(module: nn.Module) -> str:
    """Hash names, types, shapes and bytes of all tensors with SHA-256, so the file format does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network to measure with. fingerprint: SHA-256 of its weights, for manifests."""

    name: str
    network: FeatureExtractorBase = field(repr=False)
    fingerprint: str
    device: str = "cpu"
    spatial_layer: str = ""
    """Name of the module whose output, (B, C, H', W'), sFID reads; "" for none."""
    projection: Tensor | None = field(default=None, repr=False)
    """(D, d), to reduce features to d directions; None: no reduction."""
    whole: "Extractor | None" = field(default=None, repr=False)
    """Extractor that was reduced to this one; None: it is whole."""

    @property
    def parts(self) -> tuple[int, ...]:
        """Return how many features each of several joined networks has; empty for a single one."""
        return () if self.projection is not None else getattr(self.network, "sizes", ())

    @property
    def has_classes(self) -> bool:
        """Tell if the network scores classes, as the Inception score needs."""
        try:
            self.network.get_default_feature_layer_for_metric("isc")
        except KeyError:
            return False
        return True

    @property
    def weights_fingerprint(self) -> str:
        """Return the fingerprint without a projection: that of the weights alone."""
        return (self.whole or self).fingerprint

    def projected(self, projection: Tensor) -> "Extractor":
        """Return the same network with features @ projection, float64 (D, d), under its own name.

        It takes the place of a projection that is there already.
        """
        own, matrix = self.whole or self, projection.double().contiguous()
        digest = hashlib.sha256(own.fingerprint.encode() + matrix.numpy().tobytes()).hexdigest()
        return replace(own, name=f"{own.name}-pca{matrix.shape[1]}", projection=matrix, fingerprint=digest, whole=own)

    @property
    def metric_name(self) -> str:
        """Name of a Fréchet distance on these features: "FID" or "FD-<extractor>"."""
        return "FID" if self.name == "inception" else f"FD-{self.name}"

    def _batches(self, pictures: Tensor, batch_size: int, spatial: bool) -> Iterator[tuple[Tensor, ...]]:
        """Yield the network's outputs on the host, batch by batch, as float64."""
        for batch in as_rgb(pictures).split(batch_size):
            layer = self.network.get_submodule(self.spatial_layer) if spatial else None
            # Switch autocast off: features must not depend on the precision that the pictures were drawn in.
            with _seen_at(layer) as seen, torch.autocast(torch.device(self.device).type, enabled=False):
                outputs = self.network(batch.contiguous().to(self.device))
            outputs += tuple(_first_channels(activation) for activation in seen)
            yield tuple(out.double().cpu() for out in outputs)

    def _counted(self, batches: Iterator[T], num: int, batch_size: int) -> Iterator[T]:
        """Yield the batches, and show how many of `num` pictures are done."""
        with progress_bar(f"features by {self.name}", unit="pictures") as advance:
            advance(0, num)
            for count, batch in enumerate(batches, 1):
                advance(min(count * batch_size, num), num)
                yield batch

    @torch.inference_mode()
    def outputs(self, pictures: Tensor, batch_size: int = 256, spatial: bool = False) -> dict[str, Tensor]:
        """Run uint8 pictures (N, 1 or 3, H, W) -> {"features": (N, D), "logits": (N, K)}, float64 on the host.

        spatial: add "spatial" (N, H' W' 7), the first seven channels of the spatial layer, for sFID. Raises InputError
        for pictures of a wrong size or type, and for spatial features that the extractor does not have.
        """
        if spatial and not self.spatial_layer:
            raise InputError(f"--metrics sfid: {self.name} has no spatial features; expected another extractor")
        if len(pictures) == 0:
            raise InputError("pictures: none, expected at least one")
        names = ("features", "logits", "spatial")[: 3 if spatial else 2]
        batches = self._batches(pictures, batch_size, spatial)
        if len(pictures) > batch_size:
            batches = self._counted(batches, len(pictures), batch_size)
        parts = zip(*batches, strict=True)
        outputs = {name: torch.cat(part) for name, part in zip(names, parts, strict=True)}
        if self.projection is not None:
            outputs["features"] = outputs["features"] @ self.projection
        return outputs

    def features(self, pictures: Tensor, batch_size: int = 256) -> Tensor:
        """Return the features of uint8 pictures (N, 1 or 3, H, W), float64 (N, D) on the host. Raises InputError."""
        return self.outputs(pictures, batch_size)["features"]


def _first_channels(activation: Tensor) -> Tensor:
    """Flatten (B, C, H, W) -> (B, H W 7), in ADM's order, so that ADM's statistics can serve as reference."""
    return activation[:, :SPATIAL_CHANNELS].movedim(1, -1).flatten(1)


@contextmanager
def _seen_at(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the outputs of a layer; without a layer the list stays empty."""
    seen: list[Tensor] = []
    if layer is None:
        yield seen
        return
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
