"""Operands inside kernels; `layout.Operand` makes them."""

from __future__ import annotations

import triton


@triton.jit
def head_ptr(x, b, h):
    """Pointer to the first token of one head of an operand. b is int64: a batch may have more elements than 32 bits count."""
    return x.ptr + b * x.stride_b + h * x.stride_h
