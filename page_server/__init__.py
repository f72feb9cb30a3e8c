"""The page server: how the contents of pages travel between hosts, and to layers on disk."""
