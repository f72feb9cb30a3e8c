"""Process images on disk."""
