"""A whole cluster on this machine: its ports, its processes, its state between two commands. Knows no model."""
