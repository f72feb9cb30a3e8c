"""The demonstration: two isolated hosts on this machine and a busy process that moves between them."""
