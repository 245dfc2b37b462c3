"""The gate of the MLP.

Legend: T tokens (any leading dims), D channels of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.fp8 import Fp8Matrix
from based_megatron.kernels.swiglu import reference

__all__ = ["swiglu", "swiglu_gradient_rows", "swiglu_rows"]


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


def swiglu_rows(x_T2D: Tensor, *, backend: str = "reference") -> Fp8Matrix:
    """y = `swiglu` of tokens [T, 2D] in e4m3, from fp32 and without gradients: the left side of the next product.

    >>> x_T2D = torch.randn(5, 2 * 16)
    >>> torch.allclose(swiglu_rows(x_T2D).plain(), swiglu(x_T2D), rtol=2**-4, atol=1e-2)
    True
    """
    run = implementation("swiglu_rows", backend, {"reference": reference.swiglu_rows, "triton": _triton_rows})
    return Fp8Matrix(*run(x_T2D))


def swiglu_gradient_rows(
    x_T2D: Tensor, dy_TD: Tensor, weight_T: Tensor | None = None, *, backend: str = "reference"
) -> Fp8Matrix:
    """The gradient of x, [T, 2D], from that of y = `swiglu`(x), as `quantised_rows` with these weights would cast it.

    >>> x_T2D = torch.ones(5, 2 * 16, requires_grad=True)
    >>> (dx_T2D,) = torch.autograd.grad(swiglu(x_T2D).sum(), x_T2D)
    >>> torch.allclose(swiglu_gradient_rows(x_T2D.detach(), torch.ones(5, 16)).plain(), dx_T2D, rtol=2**-4)
    True
    """
    built = {"reference": reference.swiglu_gradient_rows, "triton": _triton_gradient_rows}
    return Fp8Matrix(*implementation("swiglu_gradient_rows", backend, built)(x_T2D, dy_TD, weight_T))


def _triton_rows(x_T2D: Tensor) -> tuple[Tensor, Tensor]:
    from based_megatron.kernels.swiglu import triton_swiglu_rows

    return triton_swiglu_rows.swiglu_rows(x_T2D)


def _triton_gradient_rows(*args: Any) -> tuple[Tensor, ...]:
    from based_megatron.kernels.swiglu import triton_swiglu_rows

    return triton_swiglu_rows.swiglu_gradient_rows(*args)


def _triton(x_T2D: Tensor) -> Tensor:
    if x_T2D.dtype == torch.float64:
        return reference.swiglu(x_T2D)
    from based_megatron.kernels.swiglu import triton_swiglu

    return triton_swiglu.swiglu(x_T2D)
