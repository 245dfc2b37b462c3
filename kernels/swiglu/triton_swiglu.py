"""The gate of the MLP in Triton: both halves are read where they lie, and their gradients written into one buffer.

Legend: M tokens, W width of the MLP.

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

BLOCK = 2048
"""Columns of a program: twice 16 bytes of bf16 for each thread of four warps, the fastest of 512, 1024 and 2048."""


@triton.jit
def _forward(x_ptr, y_ptr, W, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_inputs(OVERLAPS)
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < W
    value = tl.load(x_ptr + token * 2 * W + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + token * 2 * W + W + column, mask=inside, other=0.0).to(tl.float32)
    y = value * gate * tl.sigmoid(gate)
    tl.store(y_ptr + token * W + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x_ptr, dy_ptr, dx_ptr, W, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < W
    value = tl.load(x_ptr + token * 2 * W + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + token * 2 * W + W + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * W + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dvalue = dy * gate * sigmoid
    dgate = dy * value * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dx_ptr + token * 2 * W + column, dvalue.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + token * 2 * W + W + column, dgate.to(dx_ptr.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """[value | gate] to value * silu(gate)."""

    @staticmethod
    def forward(ctx: Any, x_M2W: Tensor) -> Tensor:
        x_M2W = x_M2W.contiguous()
        W = x_M2W.shape[-1] // 2
        y_MW = x_M2W.new_empty(*x_M2W.shape[:-1], W)
        grid = (y_MW.numel() // W, triton.cdiv(W, BLOCK))
        _forward[grid](x_M2W, y_MW, W, BLOCK=BLOCK, **overlapped(y_MW.device))
        ctx.save_for_backward(x_M2W)
        return y_MW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MW: Tensor) -> Tensor:
        (x_M2W,) = ctx.saved_tensors
        dx_M2W, W = torch.empty_like(x_M2W), dy_MW.shape[-1]
        _backward[(dy_MW.numel() // W, triton.cdiv(W, BLOCK))](x_M2W, dy_MW.contiguous(), dx_M2W, W, BLOCK=BLOCK)
        return dx_M2W


def swiglu(x_M2W: Tensor) -> Tensor:
    """value * silu(gate); see the package's function of the same name."""
    return SwiGLU.apply(x_M2W)
