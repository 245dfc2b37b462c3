"""The gate of the MLP.

Legend: M tokens (any leading dims), W width of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(x_M2W: Tensor, *, backend: str = "reference") -> Tensor:
    """value * silu(gate), [value | gate] = x along the last dim: the released order; Llama's is the other.

    Args:
        x_M2W: fp32, bf16, or fp64, which runs in the reference whatever the backend.
        backend: a name from `resolve_backend`.

    Returns: y_MW in the dtype of x. Backward keeps x alone and recomputes.
    """
    return implementation("swiglu", backend, {"reference": reference.swiglu, "triton": _triton})(x_M2W)


def _triton(x_M2W: Tensor) -> Tensor:
    if x_M2W.dtype == torch.float64:
        return reference.swiglu(x_M2W)
    from based_megatron.kernels.swiglu import triton_swiglu

    return triton_swiglu.swiglu(x_M2W)
