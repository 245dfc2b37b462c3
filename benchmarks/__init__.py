"""Measurements of this repository that are not installed: scripts, the simulator of sequence parallelism, and raw results."""
