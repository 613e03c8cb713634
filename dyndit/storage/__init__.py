"""Foreign formats of a class-conditional DiT, one file each: read into the native classes, written from them."""
