"""Which tensors hold an infinity or a nan."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that are not finite, in order. Waits for the device once."""
    pairs = [(name, tensor) for name, tensor in named if tensor.numel()]
    if not pairs:
        return []
    # The largest magnitude is finite if all are, and takes no memory.
    largest = torch.stack([torch.linalg.vector_norm(tensor, torch.inf).double() for _, tensor in pairs])
    return [name for (name, _), is_finite in zip(pairs, largest.isfinite().tolist(), strict=True) if not is_finite]
