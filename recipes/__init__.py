"""Complete runs as short Python files: choices only, no loops."""
