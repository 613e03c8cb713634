"""The experiments of docs/experiments.md. Each reads with at most one other recipe open."""
