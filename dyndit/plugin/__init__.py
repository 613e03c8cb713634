"""Dynamic depth inside other people's pipelines."""
