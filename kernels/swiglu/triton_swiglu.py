"""The gate of the MLP in Triton: both halves are read where they lie, and their gradients written into one buffer.

Legend: T tokens, D channels of the MLP.

    y = value silu(gate);  dvalue = dy silu(gate),  dgate = dy value s (1 + gate (1 - s)),  s = sigmoid(gate)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.triton_overlap import overlapped, wait_for_inputs

TILE_CHANNELS = 2048
"""Channels of a program: twice 16 bytes of bf16 for each thread of four warps, the fastest of 512, 1024 and 2048."""


@triton.jit
def _forward_kernel(x_ptr, y_ptr, D, TILE_CHANNELS: tl.constexpr, OVERLAPS: tl.constexpr):
    """One program: a tile of channels of one token."""
    wait_for_inputs(OVERLAPS)
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = d < D
    value = tl.load(x_ptr + token * 2 * D + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + token * 2 * D + D + d, mask=inside, other=0.0).to(tl.float32)
    y = value * gate * tl.sigmoid(gate)
    tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(x_ptr, dy_ptr, dx_ptr, D, TILE_CHANNELS: tl.constexpr):
    """One program: a tile of channels of one token."""
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = d < D
    value = tl.load(x_ptr + token * 2 * D + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + token * 2 * D + D + d, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * D + d, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dvalue = dy * gate * sigmoid
    dgate = dy * value * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dx_ptr + token * 2 * D + d, dvalue.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + token * 2 * D + D + d, dgate.to(dx_ptr.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """[value | gate] to value * silu(gate)."""

    @staticmethod
    def forward(ctx: Any, x_T2D: Tensor) -> Tensor:
        x_T2D = x_T2D.contiguous()
        D = x_T2D.shape[-1] // 2
        y_TD = x_T2D.new_empty(*x_T2D.shape[:-1], D)
        grid = (y_TD.numel() // D, triton.cdiv(D, TILE_CHANNELS))
        _forward_kernel[grid](x_T2D, y_TD, D, TILE_CHANNELS=TILE_CHANNELS, **overlapped(y_TD.device))
        ctx.save_for_backward(x_T2D)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> Tensor:
        (x_T2D,) = ctx.saved_tensors
        dx_T2D, D = torch.empty_like(x_T2D), dy_TD.shape[-1]
        _backward_kernel[(dy_TD.numel() // D, triton.cdiv(D, TILE_CHANNELS))](
            x_T2D, dy_TD.contiguous(), dx_T2D, D, TILE_CHANNELS=TILE_CHANNELS
        )
        return dx_T2D


def swiglu(x_T2D: Tensor) -> Tensor:
    """value * silu(gate); see the package's function of this name."""
    return SwiGLU.apply(x_T2D)
