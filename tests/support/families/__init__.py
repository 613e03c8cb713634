"""Tiny pipelines, a file per family: `FAMILY`, the diffusers class of its adapter, and `tiny(seed)`."""
