"""What the kernel offers, typed: ptrace, batches of system calls, page maps, ranges and feature probes."""
