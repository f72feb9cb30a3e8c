"""The messages of process state, generated from protos/."""
