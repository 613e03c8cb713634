"""Read and write models: one file for each format of a class-conditional DiT, and the native folder."""
