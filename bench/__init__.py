"""The benchmark: moves side by side, as the moved process sees them. ``python -m bench``; docs/bench.md."""
