"""A page to play with: full depth and a plan side by side, from the same seed, step by step."""
