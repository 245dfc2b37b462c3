"""Carried states as fragments: a micro batch has some rows of a tensor of all rows of the global batch."""

from math import prod

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.parallel.sequence.carried import CarriedStates

CARRIED = "carried"


def carried_fragments(carried: CarriedStates) -> list[Fragment]:
    """Views of what the next step begins with, for saving and for loading in place."""
    fragments = []
    for row, state in carried.by_row.items():
        for key, spec in carried.specs.items():
            flat = state.before[key].detach().flatten()
            fragments.append(Fragment(spec, row * prod(spec.local_shape[1:]), flat.numel(), {CARRIED: flat}))
    return fragments
