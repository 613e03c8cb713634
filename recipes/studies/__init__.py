"""The experiments behind docs/experiments.md, each readable with one other recipe open at most."""
