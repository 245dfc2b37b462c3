"""Operands inside kernels; `layout.operand` makes them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_ptr(x, b, h):
    """Pointer to the first token of one head of an operand; a batch may have more elements than 32 bits can count."""
    return x.ptr + b.to(tl.int64) * x.stride_b + h * x.stride_h
