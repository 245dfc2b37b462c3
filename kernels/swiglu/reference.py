"""The gate of the MLP in plain PyTorch.

Legend: T tokens (any leading dims), D channels of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.fp8.reference import quantised_rows


def swiglu(x_T2D: Tensor) -> Tensor:
    """value * silu(gate); see the package's function of this name."""
    value_TD, gate_TD = x_T2D.chunk(2, dim=-1)
    return value_TD * functional.silu(gate_TD)


def swiglu_rows(x_T2D: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales of y; see the package's function of this name."""
    return quantised_rows(swiglu(x_T2D.float()))[:2]


def swiglu_gradient_rows(x_T2D: Tensor, dy_TD: Tensor, weight_T: Tensor | None) -> tuple[Tensor, ...]:
    """Numbers, scales and largest scale of dx; see the package's function of this name."""
    value_TD, gate_TD = x_T2D.float().chunk(2, dim=-1)
    dy_TD, sigmoid_TD = dy_TD.float(), gate_TD.sigmoid()
    dvalue_TD = dy_TD * gate_TD * sigmoid_TD
    dgate_TD = dy_TD * value_TD * sigmoid_TD * (1 + gate_TD * (1 - sigmoid_TD))
    return quantised_rows(torch.cat([dvalue_TD, dgate_TD], dim=-1), weight_T)
