"""Train a backbone, and distil its exits."""
