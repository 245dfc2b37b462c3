"""Which tensors hold an infinity or a nan."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that are not finite, in order. Waits for the device once."""
    # The largest magnitude is finite if all are, and takes no memory.
    return [name for name, magnitude in largest_magnitudes(named).items() if not math.isfinite(magnitude)]


@torch.no_grad()
def largest_magnitudes(named: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """The largest absolute value of each tensor by its name; infinite or nan if an element is. Waits for the device once."""
    largest: dict[str, Tensor] = {}
    for name, tensor in named:
        if tensor.numel():
            found = torch.linalg.vector_norm(tensor, torch.inf).double()
            # A name may be that of several pieces; a maximum keeps what is not a number.
            largest[name] = torch.maximum(largest[name], found) if name in largest else found
    return dict(zip(largest, torch.stack(list(largest.values())).tolist(), strict=True)) if largest else {}
