"""`based bench`: every kernel checked against fp64 and timed beside its peers, in one run."""
