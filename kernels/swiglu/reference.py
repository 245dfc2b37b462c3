"""The gate of the MLP in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def swiglu(x_M2W: Tensor) -> Tensor:
    """value * silu(gate); see the package's function of the same name."""
    value_MW, gate_MW = x_M2W.chunk(2, dim=-1)
    return value_MW * functional.silu(gate_MW)
