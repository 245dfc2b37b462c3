"""Matrices of 8-bit floats (e4m3), with scales that are powers of two, and their products.

Legend: T rows (tokens, or rows of a weight), X columns, M and N rows of the two sides of a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.fp8 import reference

__all__ = ["MULTIPLE", "Fp8Matrix", "quantised_rows", "quantised_rows_and_sum", "scaled_product", "turned"]

MULTIPLE = 16
"""Sizes of a product's contraction and of its columns must be multiples of this, or the hardware cannot take them."""


class Fp8Matrix(NamedTuple):
    """A matrix numbers * scale.

    >>> Fp8Matrix(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.tensor([2.0, 4.0])).plain().tolist()
    [[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]
    """

    numbers: Tensor
    """e4m3, dense rows."""
    scale: Tensor
    """fp32 powers of two: one for each row, or one number for all."""
    largest: Tensor | None = None
    """The largest scales of parts of the rows, weighted, for `turned`."""

    def plain(self) -> Tensor:
        """The matrix in fp32, which holds its numbers exactly."""
        return self.numbers.float() * self.scale.reshape(-1, 1)

    def under_one_scale(self) -> Fp8Matrix:
        """The matrix with one number in place of scales that are equal."""
        return Fp8Matrix(self.numbers, self.scale[0])


def quantised_rows(x_TX: Tensor, weight_T: Tensor | None = None, *, backend: str = "reference") -> Fp8Matrix:
    """x in e4m3, each row under the smallest power of two that keeps its numbers within 448.

    A scale that is a power of two rounds nothing: the only error is that of the format, 2^-4 of a number at most, or 2^-10 of
    the scale where the number is too small for that. A row that is not finite has a product that is not finite.

    Args:
        x_TX: any float dtype.
        weight_T: powers of two that `turned` will multiply the rows by.
        backend: a name from `resolve_backend`.

    >>> x = quantised_rows(torch.tensor([[448.0, 1.0], [900.0, 3.0]]))
    >>> x.numbers.float().tolist(), x.scale.tolist()
    ([[448.0, 1.0], [224.0, 0.75]], [1.0, 4.0])
    """
    run = implementation("quantised_rows", backend, {"reference": reference.quantised_rows, "triton": _triton_rows})
    return Fp8Matrix(*run(x_TX, weight_T))


def quantised_rows_and_sum(
    x_TX: Tensor, weight_T: Tensor | None = None, *, backend: str = "reference"
) -> tuple[Fp8Matrix, Tensor]:
    """`quantised_rows`, and the sum of the rows in fp32, in one pass over x: a gradient in e4m3 with that of the bias.

    >>> quantised_rows_and_sum(torch.tensor([[448.0, 1.0], [900.0, 3.0]]))[1].tolist()
    [1348.0, 4.0]
    """
    built = {"reference": reference.quantised_rows_and_sum, "triton": _triton_rows_and_sum}
    *rows, sum_X = implementation("quantised_rows_and_sum", backend, built)(x_TX, weight_T)
    return Fp8Matrix(*rows), sum_X


def turned(matrix: Fp8Matrix, weight_T: Tensor | None = None, *, backend: str = "reference") -> Fp8Matrix:
    """The transpose of rows, all under the largest scale: the side of a product that is summed over rows.

    A row is brought from its own scale to the largest one, which costs bits only where its numbers are small against those of
    that row. Rows that are under one scale already are turned as they are.

    Args:
        matrix: [T, X], with a scale for each row and their largest ones, or with one scale for all.
        weight_T: powers of two that the rows are multiplied by first: those that their largest scales know of.
        backend: a name from `resolve_backend`.

    Returns: [X, T], with columns of zeros up to a multiple of 16, and the scale X times, or the one that there was.

    >>> x = turned(quantised_rows(torch.tensor([[448.0, 1.0], [900.0, 3.0]])))
    >>> x.numbers[:, :2].float().tolist(), x.scale.tolist(), tuple(x.numbers.shape)
    ([[112.0, 224.0], [0.25, 0.75]], [4.0, 4.0], (2, 16))
    """
    assert (matrix.largest is None) == (matrix.scale.ndim == 0), "the largest scales of rows are not known"
    run = implementation("turned", backend, {"reference": reference.turned, "triton": _triton_turned})
    return Fp8Matrix(*run(*matrix, weight_T, MULTIPLE))


def scaled_product(
    a: Fp8Matrix, b: Fp8Matrix, bias_N: Tensor | None = None, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """a b^T + bias, [M, N]: by the tensor cores on a GPU, else by a product of the same numbers in fp32.

    The tensor cores sum in their own registers, which keep fewer bits than fp32: the error is 3e-3 over 16,384 terms, a tenth of
    that of the format, and the product takes two thirds of the time.

    Args:
        a, b: [M, X] and [N, X], where X and N are multiples of 16.
        bias_N: in `dtype`.
        dtype: that of the result; bf16 only where rows have scales of their own.
        out: where to write the result, [M, N] of that dtype.

    >>> a, b = (quantised_rows(torch.ones(16, 16) * value) for value in (2.0, 3.0))
    >>> scaled_product(a, b, dtype=torch.float32)[0, 0].item()
    96.0
    """
    if not a.numbers.is_cuda:
        y_MN = reference.scaled_product(a.numbers, a.scale, b.numbers, b.scale, bias_N, dtype)
        return y_MN if out is None else out.copy_(y_MN)
    if out is not None and out.data_ptr() % MULTIPLE:
        return out.copy_(scaled_product(a, b, bias_N, dtype=dtype))
    scale_a, scale_b = a.scale, b.scale
    if scale_a.ndim or scale_b.ndim:  # the hardware's scales are rows' on both sides, or on none
        scale_a = scale_a.expand(a.numbers.shape[0])[:, None].contiguous()
        scale_b = scale_b.expand(b.numbers.shape[0])[None].contiguous()
    if bias_N is not None and dtype == torch.float32:  # not built
        return scaled_product(a, b, dtype=dtype, out=out).add_(bias_N)
    return torch._scaled_mm(
        a.numbers, b.numbers.t(), scale_a, scale_b, bias=bias_N, out_dtype=dtype, use_fast_accum=True, out=out
    )


def _triton_rows(*args: Any) -> tuple[Tensor, ...]:
    from based_megatron.kernels.fp8 import triton_fp8

    return triton_fp8.quantised_rows(*args)


def _triton_rows_and_sum(*args: Any) -> tuple[Tensor, ...]:
    from based_megatron.kernels.fp8 import triton_fp8

    return triton_fp8.quantised_rows_and_sum(*args)


def _triton_turned(*args: Any) -> tuple[Tensor, Tensor]:
    from based_megatron.kernels.fp8 import triton_fp8

    return triton_fp8.turned(*args)
