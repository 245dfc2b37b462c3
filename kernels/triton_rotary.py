"""Rotary position embedding in Triton: one pass over strided heads, and the inverse rotation as its gradient.

Legend: B batch, T sequence, H heads, V head dim, R rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.layout import laid_out_like, strides, unit_last_stride

HEADS_OF_PROGRAM, WARPS = 64, 4
"""Heads, of one or several tokens, that one program turns."""
POSITIONS_OF_PROGRAM = 4


@triton.jit
def _rotate_kernel(
    x,
    y,
    cos,
    sin,
    sign,
    T,
    H,
    x_b,
    x_t,
    x_h,
    y_b,
    y_t,
    y_h,
    table_b,
    V: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    RESTP: tl.constexpr,
    HEADS: tl.constexpr,
):
    """y = x with the pairs (x_r, x_{r+R}) of each head turned by the angles, times `sign`."""
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    t, h = (head // H).to(tl.int64), head % H
    x += b * x_b + (t * x_t + h * x_h)[:, None]
    y += b * y_b + (t * y_t + h * y_h)[:, None]
    r = tl.arange(0, RP)[None, :]
    exists = (t < T)[:, None] & (r < R)
    c = tl.load(cos + b * table_b + t[:, None] * R + r, mask=exists, other=0).to(tl.float32)
    s = tl.load(sin + b * table_b + t[:, None] * R + r, mask=exists, other=0).to(tl.float32) * sign
    first = tl.load(x + r, mask=exists, other=0).to(tl.float32)
    second = tl.load(x + R + r, mask=exists, other=0).to(tl.float32)
    tl.store(y + r, (first * c - second * s).to(y.dtype.element_ty), mask=exists)
    tl.store(y + R + r, (second * c + first * s).to(y.dtype.element_ty), mask=exists)
    if RESTP > 0:
        v = 2 * R + tl.arange(0, RESTP)[None, :]
        passes = (t < T)[:, None] & (v < V)
        tl.store(y + v, tl.load(x + v, mask=passes), mask=passes)


class Rotate(torch.autograd.Function):
    """(x, cos, sin) to the rotated x; the tables get no gradient."""

    @staticmethod
    def forward(ctx: Any, x_BTHV: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x_BTHV, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHV: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(dy_BTHV, cos, sin, -1), None, None


def rotate(x_BTHV: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x turned by sign times the angles of the tables ([T, R] or [B, T, R]); tokens or batch outermost in memory as in x."""
    x_BTHV = unit_last_stride(x_BTHV)
    B, T, H, V = x_BTHV.shape
    R = cos.shape[-1]
    rest = V - 2 * R
    y_BTHV = laid_out_like(x_BTHV)
    _rotate_kernel[(triton.cdiv(T * H, HEADS_OF_PROGRAM), B)](
        x_BTHV,
        y_BTHV,
        cos.contiguous(),
        sin.contiguous(),
        sign,
        T,
        H,
        *strides(x_BTHV, y_BTHV),
        T * R if cos.ndim == 3 and cos.shape[0] > 1 else 0,
        V=V,
        R=R,
        RP=triton.next_power_of_2(R),
        RESTP=triton.next_power_of_2(rest) if rest else 0,
        HEADS=HEADS_OF_PROGRAM,
        num_warps=WARPS,
    )
    return y_BTHV


def apply_rotary(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary embedding; see the package's function of the same name."""
    return Rotate.apply(x_BTHV, cos_TR, sin_TR) if cos_TR.shape[-1] else x_BTHV


@triton.jit
def _tables_kernel(
    positions, cos, sin, N, SLOPE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, POSITIONS: tl.constexpr
):
    n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    r = tl.arange(0, RP)
    position = tl.load(positions + n, mask=n < N, other=0).to(tl.float64)
    angle = position[:, None] * tl.exp(r.to(tl.float64) * SLOPE)[None, :]
    exists = (n < N)[:, None] & (r < R)[None, :]
    place = n[:, None].to(tl.int64) * R + r[None, :]
    tl.store(cos + place, tl.cos(angle).to(cos.dtype.element_ty), mask=exists)
    tl.store(sin + place, tl.sin(angle).to(sin.dtype.element_ty), mask=exists)


def rotary_tables(positions_T: Tensor, rotated: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R] for `rotated` dims; see the package's function of the same name."""
    R = (rotated + 1) // 2
    cos_TR, sin_TR = (torch.empty(*positions_T.shape, R, dtype=dtype, device=positions_T.device) for _ in range(2))
    _tables_kernel[(triton.cdiv(positions_T.numel(), POSITIONS_OF_PROGRAM),)](
        positions_T.contiguous(),
        cos_TR,
        sin_TR,
        positions_T.numel(),
        SLOPE=-2 * math.log(base) / rotated,
        R=R,
        RP=triton.next_power_of_2(R),
        POSITIONS=POSITIONS_OF_PROGRAM,
        num_warps=WARPS,
    )
    return cos_TR, sin_TR
