"""Complete runs as short Python files: choices only, no loops. `studies` holds the experiments behind the log."""
