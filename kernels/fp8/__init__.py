"""Matrices of 8-bit floats (e4m3), with scales that are powers of two, and their products.

Legend: T rows (tokens, or rows of a weight), X columns, M and N rows of the two sides of a product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.fp8 import reference

__all__ = ["MULTIPLE", "Fp8Matrix", "quantised_rows", "quantised_rows_and_sum", "scaled_product", "turned"]

MULTIPLE = 16
"""Sizes of a product's contraction and of its columns must be multiples of this, or the hardware cannot take them."""


class Fp8Matrix(NamedTuple):
    """A matrix numbers * scale."""

    numbers: Tensor
    """e4m3, dense rows."""
    scale: Tensor
    """fp32 powers of two: one for each row, or one number for all."""

    def plain(self) -> Tensor:
        """The matrix in fp32, which holds its numbers exactly."""
        return self.numbers.float() * self.scale.reshape(-1, 1)


def quantised_rows(x_TX: Tensor, *, backend: str = "reference") -> Fp8Matrix:
    """x in e4m3, each row under the smallest power of two that keeps its numbers within 448.

    A scale that is a power of two rounds nothing: the only error is that of the format, 2^-4 of a number at most, or 2^-10 of
    the scale where the number is too small for that. A row that is not finite has a product that is not finite.

    Args:
        x_TX: any float dtype.
        backend: a name from `resolve_backend`.

    >>> x = quantised_rows(torch.tensor([[448.0, 1.0], [900.0, 3.0]]))
    >>> x.numbers.float().tolist(), x.scale.tolist()
    ([[448.0, 1.0], [224.0, 0.75]], [1.0, 4.0])
    """
    run = implementation("quantised_rows", backend, {"reference": reference.quantised_rows, "triton": _triton_rows})
    return Fp8Matrix(*run(x_TX))


def quantised_rows_and_sum(x_TX: Tensor, *, backend: str = "reference") -> tuple[Fp8Matrix, Tensor]:
    """`quantised_rows`, and the sum of the rows in fp32, in one pass over x: a gradient in e4m3 with that of the bias.

    >>> quantised_rows_and_sum(torch.tensor([[448.0, 1.0], [900.0, 3.0]]))[1].tolist()
    [1348.0, 4.0]
    """
    built = {"reference": reference.quantised_rows_and_sum, "triton": _triton_rows_and_sum}
    *rows, sum_X = implementation("quantised_rows_and_sum", backend, built)(x_TX)
    return Fp8Matrix(*rows), sum_X


def turned(matrix: Fp8Matrix, weight_T: Tensor | None = None, *, backend: str = "reference") -> Fp8Matrix:
    """The transpose of rows under one scale for all: the side of a product that is summed over rows.

    A row is brought from its own scale to the largest one, which costs bits only where its numbers are small beside those of
    that row. Rows under one scale are turned as they are.

    Args:
        matrix: [T, X], with a scale for each row or one for all.
        weight_T: powers of two that the rows are multiplied by first.
        backend: a name from `resolve_backend`.

    Returns: [X, T], with columns of zeros up to a multiple of 16.

    >>> x = turned(quantised_rows(torch.tensor([[448.0, 1.0], [900.0, 3.0]])))
    >>> x.numbers[:, :2].float().tolist(), x.scale.item(), tuple(x.numbers.shape)
    ([[112.0, 224.0], [0.25, 0.75]], 4.0, (2, 16))
    """
    run = implementation("turned", backend, {"reference": reference.turned, "triton": _triton_turned})
    return Fp8Matrix(*run(matrix.numbers, matrix.scale, weight_T, MULTIPLE))


def scaled_product(
    a: Fp8Matrix,
    b: Fp8Matrix,
    bias_N: Tensor | None = None,
    *,
    dtype: torch.dtype,
    fast: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """a b^T + bias, [M, N], summed in fp32: by the tensor cores on a GPU, else by a product of the same numbers in fp32.

    Args:
        a, b: [M, X] and [N, X], where X and N are multiples of 16.
        bias_N: in `dtype`.
        dtype: that of the result.
        out: where to write the result, [M, N] of that dtype.
        fast: sum in the tensor cores' own registers, which keep fewer bits than fp32: for short sums that need not be exact.

    >>> a, b = (quantised_rows(torch.ones(16, 16) * value) for value in (2.0, 3.0))
    >>> scaled_product(a, b, dtype=torch.float32)[0, 0].item()
    96.0
    """
    if not a.numbers.is_cuda:
        y_MN = reference.scaled_product(a.numbers, a.scale, b.numbers, b.scale, bias_N, dtype)
        return y_MN if out is None else out.copy_(y_MN)
    if out is not None and out.data_ptr() % MULTIPLE:
        return out.copy_(scaled_product(a, b, bias_N, dtype=dtype, fast=fast))
    scale_a, scale_b = a.scale, b.scale
    if scale_a.ndim or scale_b.ndim:  # the hardware's scales are rows' on both sides, or on none
        scale_a = scale_a.expand(a.numbers.shape[0])[:, None].contiguous()
        scale_b = scale_b.expand(b.numbers.shape[0])[None].contiguous()
    return torch._scaled_mm(
        a.numbers, b.numbers.t(), scale_a, scale_b, bias=bias_N, out_dtype=dtype, use_fast_accum=fast, out=out
    )


def _triton_rows(x_TX: Tensor) -> tuple[Tensor, Tensor]:
    from based_megatron.kernels.fp8 import triton_fp8

    return triton_fp8.quantised_rows(x_TX)


def _triton_rows_and_sum(x_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from based_megatron.kernels.fp8 import triton_fp8

    return triton_fp8.quantised_rows_and_sum(x_TX)


def _triton_turned(
    numbers_TX: Tensor, scale_T: Tensor, weight_T: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor]:
    from based_megatron.kernels.fp8 import triton_fp8

    return triton_fp8.turned(numbers_TX, scale_T, weight_T, multiple)
