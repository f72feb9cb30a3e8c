"""A migration: both hosts' state machines, rounds, connections, daemon and worker."""
