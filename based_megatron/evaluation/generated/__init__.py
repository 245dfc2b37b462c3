"""Recall tasks that are generated from files of this machine, and need neither a network nor lm-eval."""
