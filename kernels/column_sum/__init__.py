"""Sums of the rows of a matrix: gradients of biases, and of whatever else is shared by all tokens.

Legend: T rows, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation

__all__ = ["column_sum"]


def column_sum(x_TD: Tensor, total_D: Tensor, *, adds: bool = False, backend: str = "reference") -> Tensor:
    """The sum of all rows, summed in fp32 (fp64 of fp64), written to `total_D` in its dtype; the same bits in every run.

    Args:
        x_TD: any float dtype; the last dimension is dense.
        total_D: overwritten, or added to if `adds`.
        backend: a name from `resolve_backend`.

    Returns: total_D.

    >>> column_sum(torch.ones(3, 2), torch.full((2,), 10.0), adds=True)
    tensor([13., 13.])
    """
    return implementation("column_sum", backend, {"reference": _reference, "triton": _triton})(x_TD, total_D, adds)


def _reference(x_TD: Tensor, total_D: Tensor, adds: bool) -> Tensor:
    sum_D = x_TD.sum(0, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    return total_D.add_(sum_D) if adds else total_D.copy_(sum_D)


def _triton(*args: Any) -> Tensor:
    from based_megatron.kernels.column_sum import triton_column_sum

    return triton_column_sum.column_sum(*args)
