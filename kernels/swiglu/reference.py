"""The gate of the MLP in plain PyTorch.

Legend: T tokens (any leading dims), D channels of the MLP.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def swiglu(x_T2D: Tensor) -> Tensor:
    """value * silu(gate); see the package's function of this name."""
    value_TD, gate_TD = x_T2D.chunk(2, dim=-1)
    return value_TD * functional.silu(gate_TD)
