"""RMSNorm of a residual stream, with the addition in front of it.

Legend: T tokens (any leading dims), D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.fp8.tokens import Fp8Tokens
from based_megatron.kernels.rms_norm import reference

__all__ = ["add_rms_norm", "add_rms_norm_rows"]


def add_rms_norm(
    residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float, *, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """The sum r = residual + update and its norm r / sqrt(mean(r^2) + eps) * weight, in one pass over memory.

    Args:
        residual_TD: fp32 or fp64; the sum and the norm are computed in this dtype, fp64 by the reference whatever the backend.
        update_TD: output of the last layer, of any float dtype; None adds nothing.
        weight_D: in the dtype of the normed output.
        backend: a name from `resolve_backend`.

    Returns: r in the dtype of the residual, and the norm of r in the dtype of the weight. Gradients flow to residual, update
    and weight, from both outputs.

    >>> residual_TD, update_TD = torch.randn(5, 16), torch.randn(5, 16)
    >>> sum_TD, normed_TD = add_rms_norm(residual_TD, update_TD, torch.ones(16), eps=1e-6)
    >>> torch.equal(sum_TD, residual_TD + update_TD), torch.allclose(normed_TD.square().mean(-1), torch.ones(5))
    (True, True)
    """
    run = implementation("add_rms_norm", backend, {"reference": reference.add_rms_norm, "triton": _triton})
    return run(residual_TD, update_TD, weight_D, eps)


def add_rms_norm_rows(
    residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float, *, backend: str = "reference"
) -> tuple[Tensor, Fp8Tokens]:
    """`add_rms_norm` with the norm in e4m3, cast from the residual's dtype.

    >>> residual_TD = torch.randn(2, 5, 16)
    >>> _, normed = add_rms_norm_rows(residual_TD, None, torch.ones(16), eps=1e-6)
    >>> exact = add_rms_norm(residual_TD, None, torch.ones(16), eps=1e-6)[1].flatten(0, 1)
    >>> torch.allclose(normed.rows_TD.plain(), exact, rtol=2**-4, atol=1e-2)
    True
    """
    built = {"reference": reference.add_rms_norm_rows, "triton": _triton_rows}
    return implementation("add_rms_norm_rows", backend, built)(residual_TD, update_TD, weight_D, eps)


def _triton_rows(residual_TD: Tensor, *args: Any) -> tuple[Tensor, Fp8Tokens]:
    if residual_TD.dtype == torch.float64:
        return reference.add_rms_norm_rows(residual_TD, *args)
    from based_megatron.kernels.rms_norm import triton_rms_norm

    return triton_rms_norm.add_rms_norm_rows(residual_TD, *args)


def _triton(residual_TD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if residual_TD.dtype == torch.float64:
        return reference.add_rms_norm(residual_TD, *args)
    from based_megatron.kernels.rms_norm import triton_rms_norm

    return triton_rms_norm.add_rms_norm(residual_TD, *args)
