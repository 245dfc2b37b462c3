"""File formats that `based prep` reads: one file each, listed in registry.py."""
