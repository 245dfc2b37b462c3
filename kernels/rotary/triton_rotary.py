"""Rotary position embedding in Triton: one pass over strided heads, and the inverse rotation as its gradient.

Legend: B batch, T tokens, H heads, V head dim, R rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.layout import laid_out_like, operand, unit_last_stride

TILE_HEADS, WARPS = 64, 4
"""Heads, of one or several tokens, that one program rotates."""
TILE_POSITIONS = 4


@triton.jit
def _rotate_kernel(
    x, y, cos_ptr, sin_ptr, table_stride_b, sign, T, H,
    V: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr, PADDED_REST: tl.constexpr, TILE_HEADS: tl.constexpr,
):  # fmt: skip
    """One program: some heads of one sequence, rotated by `sign` times the angles; the dims from 2R on are copied."""
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    t, h = (head // H).to(tl.int64), head % H
    x_ptr = x.ptr + b * x.stride_b + (t * x.stride_t + h * x.stride_h)[:, None]
    y_ptr = y.ptr + b * y.stride_b + (t * y.stride_t + h * y.stride_h)[:, None]
    r = tl.arange(0, PADDED_R)[None, :]
    inside = (t < T)[:, None] & (r < R)
    cos = tl.load(cos_ptr + b * table_stride_b + t[:, None] * R + r, mask=inside, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + b * table_stride_b + t[:, None] * R + r, mask=inside, other=0).to(tl.float32) * sign
    first = tl.load(x_ptr + r, mask=inside, other=0).to(tl.float32)
    second = tl.load(x_ptr + R + r, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + r, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + R + r, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)
    if PADDED_REST > 0:
        v = 2 * R + tl.arange(0, PADDED_REST)[None, :]
        inside_rest = (t < T)[:, None] & (v < V)
        tl.store(y_ptr + v, tl.load(x_ptr + v, mask=inside_rest), mask=inside_rest)


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
    """x rotated by sign times the angles of the tables ([T, R] or [B, T, R]); tokens or batch outermost in memory as in x."""
    x_BTHV = unit_last_stride(x_BTHV)
    B, T, H, V = x_BTHV.shape
    R = cos.shape[-1]
    rest = V - 2 * R
    y_BTHV = laid_out_like(x_BTHV)
    _rotate_kernel[(triton.cdiv(T * H, TILE_HEADS), B)](
        operand(x_BTHV),
        operand(y_BTHV),
        cos.contiguous(),
        sin.contiguous(),
        T * R if cos.ndim == 3 and cos.shape[0] > 1 else 0,
        sign,
        T,
        H,
        V=V,
        R=R,
        PADDED_R=triton.next_power_of_2(R),
        PADDED_REST=triton.next_power_of_2(rest) if rest else 0,
        TILE_HEADS=TILE_HEADS,
        num_warps=WARPS,
    )
    return y_BTHV


def apply_rotary(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The rotated heads; see the package's function of this name."""
    return Rotate.apply(x_BTHV, cos_TR, sin_TR) if cos_TR.shape[-1] else x_BTHV


@triton.jit
def _tables_kernel(
    positions_ptr, cos_ptr, sin_ptr, T, SLOPE: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr,
    TILE_POSITIONS: tl.constexpr,
):  # fmt: skip
    """One program: the rows of some positions, whose angles are position * exp(SLOPE r)."""
    t = tl.program_id(0) * TILE_POSITIONS + tl.arange(0, TILE_POSITIONS)
    r = tl.arange(0, PADDED_R)
    position = tl.load(positions_ptr + t, mask=t < T, other=0).to(tl.float64)
    angle = position[:, None] * tl.exp(r.to(tl.float64) * SLOPE)[None, :]
    inside = (t < T)[:, None] & (r < R)[None, :]
    place = t[:, None].to(tl.int64) * R + r[None, :]
    tl.store(cos_ptr + place, tl.cos(angle).to(cos_ptr.dtype.element_ty), mask=inside)
    tl.store(sin_ptr + place, tl.sin(angle).to(sin_ptr.dtype.element_ty), mask=inside)


def rotary_tables(positions_T: Tensor, rotated: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R] for `rotated` dims; see the package's function of this name."""
    R = (rotated + 1) // 2
    cos_TR, sin_TR = (torch.empty(*positions_T.shape, R, dtype=dtype, device=positions_T.device) for _ in range(2))
    _tables_kernel[(triton.cdiv(positions_T.numel(), TILE_POSITIONS),)](
        positions_T.contiguous(),
        cos_TR,
        sin_TR,
        positions_T.numel(),
        SLOPE=-2 * math.log(base) / rotated,
        R=R,
        PADDED_R=triton.next_power_of_2(R),
        TILE_POSITIONS=TILE_POSITIONS,
        num_warps=WARPS,
    )
    return cos_TR, sin_TR
