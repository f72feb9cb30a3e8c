"""Which pages were written since, and which pages of shared memory are used."""
