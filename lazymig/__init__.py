"""Moves a running Linux process to another host while it keeps working. docs/architecture.md has the parts."""
