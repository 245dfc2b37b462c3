"""Sums of squares in Triton: one pass over memory, one launch for all stretches.

Legend: N elements, S stretches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048
ALIGNED = 16
"""A program begins at a multiple of so many elements: so its loads are of 16 bytes a thread, wherever its stretch begins."""


@triton.jit
def _squares_kernel(
    x_ptr, stretches_ptr, partial_ptr, N, ALIGNED: tl.constexpr, TILE_ELEMENTS: tl.constexpr
):  # fmt: skip
    """One program: the squares of one stretch."""
    s = tl.program_id(0).to(tl.int64)
    first, end = tl.load(stretches_ptr + 2 * s), tl.load(stretches_ptr + 2 * s + 1)
    start = tl.multiple_of(first // ALIGNED * ALIGNED, ALIGNED)
    squares = tl.zeros([TILE_ELEMENTS], dtype=tl.float32)
    for tile_start in range(start, end, TILE_ELEMENTS):
        n = tl.multiple_of(tile_start, ALIGNED) + tl.arange(0, TILE_ELEMENTS)
        x = tl.load(x_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        x = tl.where((n >= first) & (n < end), x, 0.0)
        squares += x * x
    tl.store(partial_ptr + s, tl.sum(squares, axis=0))


def square_sum(x_N: Tensor, stretches_S2: Tensor) -> Tensor:
    """The sum of squares; see the package's function of this name."""
    assert x_N.is_contiguous() and stretches_S2.is_contiguous()
    partial_S = torch.empty(len(stretches_S2), dtype=torch.float32, device=x_N.device)
    if len(stretches_S2):
        _squares_kernel[(len(stretches_S2),)](
            x_N, stretches_S2, partial_S, x_N.numel(), ALIGNED=ALIGNED, TILE_ELEMENTS=TILE_ELEMENTS
        )
    return partial_S.sum(dtype=torch.float64)
