"""Tiny pipelines, a file per family: `FAMILY`, the diffusers class of its adapter, and `tiny(seed)`."""

import support.tiny_pipelines  # noqa: F401 (it loads every family, so whichever is imported first, it comes before)
