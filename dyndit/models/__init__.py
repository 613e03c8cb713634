"""Backbones, exits and the model that runs them. To add a family, add one file here; `families()` finds it."""

from dyndit.models.registry import families

__all__ = ["families"]
