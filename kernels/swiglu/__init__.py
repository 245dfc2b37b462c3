"""The gate of the MLP.

Legend: T tokens (any leading dims), D channels of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(x_T2D: Tensor, *, backend: str = "reference") -> Tensor:
    """value * silu(gate), [value | gate] = x along the last dim: the released order; Llama's is the other.

    Args:
        x_T2D: fp32, bf16, or fp64, which runs in the reference whatever the backend.
        backend: a name from `resolve_backend`.

    Returns: y_TD in the dtype of x. Backward keeps x alone and recomputes.

    >>> x_T2D = torch.randn(5, 2 * 16)
    >>> y_TD = swiglu(x_T2D)
    >>> torch.allclose(y_TD, x_T2D[:, :16] * torch.nn.functional.silu(x_T2D[:, 16:]))
    True
    """
    return implementation("swiglu", backend, {"reference": reference.swiglu, "triton": _triton})(x_T2D)


def _triton(x_T2D: Tensor) -> Tensor:
    if x_T2D.dtype == torch.float64:
        return reference.swiglu(x_T2D)
    from based_megatron.kernels.swiglu import triton_swiglu

    return triton_swiglu.swiglu(x_T2D)
