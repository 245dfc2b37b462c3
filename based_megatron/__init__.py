"""Distributed pretraining of the Based architecture (arXiv 2402.18668)."""

__version__ = "0.1.0"
