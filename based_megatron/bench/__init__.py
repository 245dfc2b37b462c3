"""`based bench`: every kernel checked against fp64 and timed against baselines, in one run."""
