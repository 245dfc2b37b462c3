"""The mixers' operations: one folder each, with a PyTorch reference and one public entry.

Imports nothing of ours but the errors. Tensor names carry their shape; each file has a legend.
"""
