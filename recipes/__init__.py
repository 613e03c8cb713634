"""Complete runs as short Python files: choices only, no loops. `studies` holds the experiments of the log."""
