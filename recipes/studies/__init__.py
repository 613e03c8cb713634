"""The experiments behind docs/experiments.md, each readable by itself."""
