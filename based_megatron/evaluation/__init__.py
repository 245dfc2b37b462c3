"""Evaluation of trained models: lm-eval's tasks, and recall tasks that any machine generates from its own files."""
