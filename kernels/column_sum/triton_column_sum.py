"""Sums of the rows of a matrix in Triton: runs of rows first, then the runs in their order.

Legend: T rows, D columns, N runs of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from based_megatron.kernels.programs import programs_of

TILE_ROWS, TILE_COLUMNS = 32, 128
INTERPRETER_PROGRAMS = 6


@triton.jit
def _runs_kernel(
    x_ptr, partial_ptr, T, D, stride_t, rows_of_run, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):  # fmt: skip
    """One program: a tile of columns of one run of rows."""
    run = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = d < D
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], dtype=tl.float32)
    first = run * rows_of_run
    for start in range(first, min(first + rows_of_run, T), TILE_ROWS):
        t = start + tl.arange(0, TILE_ROWS)
        own = (t < min(first + rows_of_run, T))[:, None] & inside[None, :]
        total += tl.load(x_ptr + t[:, None] * stride_t + d[None, :], mask=own, other=0.0).to(tl.float32)
    tl.store(partial_ptr + run * D + d, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _total_kernel(
    partial_ptr, total_ptr, N, D, ADDS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):  # fmt: skip
    """One program: a tile of columns of the total."""
    d = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = d < D
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], dtype=tl.float32)
    for start in range(0, N, TILE_ROWS):
        n = start + tl.arange(0, TILE_ROWS)
        own = (n < N)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + n[:, None] * D + d[None, :], mask=own, other=0.0)
    sum_D = tl.sum(total, axis=0)
    if ADDS:
        sum_D += tl.load(total_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + d, sum_D.to(total_ptr.dtype.element_ty), mask=inside)


def column_sum(x_TD: Tensor, total_D: Tensor, adds: bool) -> Tensor:
    """The sum of all rows; see the package's function of this name."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == 1 and total_D.is_contiguous() and total_D.shape == (D,), (x_TD.stride(), total_D.shape)
    tiles = triton.cdiv(D, TILE_COLUMNS)
    runs = min(triton.cdiv(T, TILE_ROWS), max(1, programs_of(x_TD.device, INTERPRETER_PROGRAMS) // tiles))
    rows_of_run = triton.cdiv(T, runs)
    partial_ND = torch.empty(triton.cdiv(T, rows_of_run), D, dtype=torch.float32, device=x_TD.device)
    _runs_kernel[(tiles, len(partial_ND))](
        x_TD, partial_ND, T, D, x_TD.stride(0), rows_of_run, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS
    )
    _total_kernel[(tiles,)](
        partial_ND, total_D, len(partial_ND), D, ADDS=adds, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS
    )
    return total_D
