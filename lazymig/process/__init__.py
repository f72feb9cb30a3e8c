"""The state of a process: one module for each kind of resource, dump and restore side by side."""
