"""Backbones by the name that `config.json` records. A new family: one file, one line here."""

from dyndit.models.base import Backbone, Condition, Conditioning, Inputs, State
from dyndit.models.dit import CARDS, ClassConditionalDiT, DiTConfig
from dyndit.models.identity import tensors_hash

FAMILIES: dict[str, type[Backbone]] = {ClassConditionalDiT.family: ClassConditionalDiT}

__all__ = [
    "CARDS",
    "FAMILIES",
    "Backbone",
    "ClassConditionalDiT",
    "Condition",
    "Conditioning",
    "DiTConfig",
    "Inputs",
    "State",
    "tensors_hash",
]
