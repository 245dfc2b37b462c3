"""Matrices in e4m3 in plain PyTorch: what the kernels and the tensor cores compute, for tests and for machines without them.

Legend: T rows, X columns, M and N rows of the two sides of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 448.0
"""The largest number of e4m3."""
LEAST_SCALE = 2.0**-100
"""The scale of a row of zeros, and the least of any row."""
LEAST_COMMON_SCALE = 2.0**-120
"""The least scale of several rows: their own may be weighted."""


def quantised_rows(x_TX: Tensor, weight_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and largest scale of the rows; see the package's function of this name."""
    x_TX = x_TX.float()
    scale_T = power_of_two_scale(x_TX.abs().amax(1))
    largest = (scale_T if weight_T is None else scale_T * weight_T).amax()
    return (x_TX * (1 / scale_T)[:, None]).to(torch.float8_e4m3fn), scale_T, largest[None]


def quantised_rows_and_sum(x_TX: Tensor, weight_T: Tensor | None = None) -> tuple[Tensor, ...]:
    """Numbers, scales, largest scale and sum of the rows; see the package's function of this name."""
    return *quantised_rows(x_TX, weight_T), x_TX.sum(0, dtype=torch.float32)


def power_of_two_scale(absmax: Tensor) -> Tensor:
    """The smallest power of two, but at least LEAST_SCALE, that brings fp32 numbers up to `absmax` to 448 at most."""
    bits = (absmax / LARGEST).view(torch.int32)
    # Any bit of the mantissa carries over into the exponent.
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32).clamp(min=LEAST_SCALE)


def turned(
    numbers_TX: Tensor, scale_T: Tensor, largest: Tensor | None, weight_T: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor]:
    """Numbers and scale of the transpose; see the package's function of this name."""
    common_X, ratio = scale_T, scale_T.new_ones(1)
    if largest is not None:
        common = largest.amax().clamp(min=LEAST_COMMON_SCALE)
        ratio = (scale_T if weight_T is None else scale_T * weight_T) / common
        common_X = common.repeat(numbers_TX.shape[1])
    numbers_XT = (numbers_TX.float() * ratio[:, None]).t()
    padded = functional.pad(numbers_XT, (0, -numbers_XT.shape[1] % multiple))
    return padded.to(torch.float8_e4m3fn).contiguous(), common_X


def scaled_product(
    a_MX: Tensor, scale_a: Tensor, b_NX: Tensor, scale_b: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a b^T + bias of matrices with scales of rows or of all; see the package's function of this name."""
    y_MN = (a_MX.float() @ b_NX.float().t()) * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(dtype)
