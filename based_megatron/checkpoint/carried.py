"""Carried states as fragments: a micro batch has some rows of a tensor of all rows of the global batch."""

from math import prod

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.parallel.sequence.carried import CarriedStates

CARRIED = "carried"


def carried_fragments(carries: CarriedStates) -> list[Fragment]:
    """Views of what the next step begins with, for saving and for loading in place."""
    fragments = []
    for row, carry in carries.by_row.items():
        for key, spec in carries.specs.items():
            flat = carry.before[key].detach().flatten()
            fragments.append(Fragment(spec, row * prod(spec.local_shape[1:]), flat.numel(), {CARRIED: flat}))
    return fragments
