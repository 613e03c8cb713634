"""Weights that ship with the package; each file names its recipe in `README.md` beside it."""
