"""The gate of the MLP and its gradient, written as rows in e4m3: a program holds a whole token, and so knows its scale.

Legend: T tokens, D channels of the MLP. Formulas are those of `triton_swiglu.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from based_megatron.kernels.fp8.reference import LARGEST, LEAST_SCALE
from based_megatron.kernels.fp8.triton_fp8 import power_of_two_scale, programs, row_warps, scales


@triton.jit
def _forward_rows_kernel(
    x_ptr, numbers_ptr, scale_ptr, D,
    LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """One program: one token."""
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_D)
    inside = d < D
    value = tl.load(x_ptr + token * 2 * D + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + token * 2 * D + D + d, mask=inside, other=0.0).to(tl.float32)
    y = value * gate * tl.sigmoid(gate)
    scale = power_of_two_scale(tl.max(tl.abs(y), axis=0), LARGEST, LEAST_SCALE)
    tl.store(scale_ptr + token, scale)
    tl.store(numbers_ptr + token * D + d, (y * (1 / scale)).to(numbers_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_rows_kernel(
    x_ptr, dy_ptr, weight_ptr, numbers_ptr, scale_ptr, largest_ptr, T, D, tokens_per_program,
    HAS_WEIGHT: tl.constexpr, LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """One program: some tokens after each other, and their largest weighted scale."""
    program, d = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_D)
    inside = d < D
    largest = 0.0
    first = program * tokens_per_program
    for token in range(first, min(first + tokens_per_program, T)):
        value = tl.load(x_ptr + token * 2 * D + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x_ptr + token * 2 * D + D + d, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + token * D + d, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        dvalue = dy * gate * sigmoid
        dgate = dy * value * sigmoid * (1 + gate * (1 - sigmoid))
        absmax = tl.max(tl.maximum(tl.abs(dvalue), tl.abs(dgate)), axis=0)
        scale = power_of_two_scale(absmax, LARGEST, LEAST_SCALE)
        tl.store(scale_ptr + token, scale)
        row_ptr = numbers_ptr + token * 2 * D + d
        tl.store(row_ptr, (dvalue * (1 / scale)).to(numbers_ptr.dtype.element_ty), mask=inside)
        tl.store(row_ptr + D, (dgate * (1 / scale)).to(numbers_ptr.dtype.element_ty), mask=inside)
        largest = tl.maximum(largest, scale * tl.load(weight_ptr + token) if HAS_WEIGHT else scale)
    tl.store(largest_ptr + program, largest)


def swiglu_rows(x_T2D: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales of y; see the package's function of this name."""
    x_T2D = x_T2D.contiguous()
    T, D = x_T2D.shape[0], x_T2D.shape[1] // 2
    numbers_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn, device=x_T2D.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_T2D.device)
    _forward_rows_kernel[(T,)](x_T2D, numbers_TD, scale_T, D, **_constants(D))
    return numbers_TD, scale_T


def swiglu_gradient_rows(x_T2D: Tensor, dy_TD: Tensor, weight_T: Tensor | None) -> tuple[Tensor, ...]:
    """Numbers, scales and largest scales of dx; see the package's function of this name."""
    x_T2D, (T, D) = x_T2D.contiguous(), dy_TD.shape
    numbers_T2D = torch.empty_like(x_T2D, dtype=torch.float8_e4m3fn)
    tokens_per_program = triton.cdiv(T, programs(x_T2D.device))
    grid = triton.cdiv(T, tokens_per_program)
    scale_T, largest = scales(T, grid, x_T2D.device)
    _backward_rows_kernel[(grid,)](
        x_T2D,
        dy_TD.contiguous(),
        scale_T if weight_T is None else weight_T,
        numbers_T2D,
        scale_T,
        largest,
        T,
        D,
        tokens_per_program,
        HAS_WEIGHT=weight_T is not None,
        **_constants(D),
    )
    return numbers_T2D, scale_T, largest


def _constants(D: int) -> dict[str, int | float]:
    padded_D = triton.next_power_of_2(D)
    return {
        "LARGEST": LARGEST,
        "LEAST_SCALE": LEAST_SCALE,
        "PADDED_D": padded_D,
        "num_warps": row_warps(2 * padded_D),
    }
