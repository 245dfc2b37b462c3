"""Sums of squares in plain PyTorch.

Legend: N elements, S stretches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_sum(x_N: Tensor, stretches_S2: Tensor) -> Tensor:
    """The sum of squares, in fp64; see the package's function of this name."""
    squares = [x_N[first:end].double().square().sum() for first, end in stretches_S2.tolist()]
    return torch.stack([x_N.new_zeros((), dtype=torch.float64), *squares]).sum()
