"""A whole cluster on this machine: its ports, its processes, and its files between two commands."""
