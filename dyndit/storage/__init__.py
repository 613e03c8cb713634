"""Read and write models: one file for each format, and for each class of diffusers."""
