"""A process on disk, in CRIU's image format: what migration does, with a directory as the other host."""
