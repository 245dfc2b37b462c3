"""Matrices in e4m3 in Triton: rows are read once and cast; cast rows are turned round.

Legend: T rows, X columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from based_megatron.kernels.fp8.reference import LARGEST, LEAST_COMMON_SCALE, LEAST_SCALE
from based_megatron.kernels.programs import programs_of

TILE_ROWS, TILE_COLUMNS = 128, 64
"""Part of a matrix that a program turns round."""
INTERPRETER_PROGRAMS = 3


@triton.jit
def power_of_two_scale(absmax, LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr):
    """The smallest power of two, but at least LEAST_SCALE, that brings numbers up to absmax to LARGEST at most."""
    bits = (absmax / LARGEST).to(tl.int32, bitcast=True)
    scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(scale, LEAST_SCALE)


@triton.jit
def _rows_kernel(
    x_ptr, weight_ptr, numbers_ptr, scale_ptr, largest_ptr, partial_sum_ptr, T, X, rows_per_program,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr, PADDED_X: tl.constexpr,
):  # fmt: skip
    """One program: some rows after each other, their largest weighted scale, and their sum."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED_X)
    inside = columns < X
    largest = 0.0
    total = tl.zeros([PADDED_X], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, min(first + rows_per_program, T)):
        x = tl.load(x_ptr + row * X + columns, mask=inside, other=0.0).to(tl.float32)
        scale = power_of_two_scale(tl.max(tl.abs(x), axis=0), LARGEST, LEAST_SCALE)
        tl.store(scale_ptr + row, scale)
        tl.store(numbers_ptr + row * X + columns, (x * (1 / scale)).to(numbers_ptr.dtype.element_ty), mask=inside)
        largest = tl.maximum(largest, scale * tl.load(weight_ptr + row) if HAS_WEIGHT else scale)
        if HAS_SUM:
            total += x
    tl.store(largest_ptr + program, largest)
    if HAS_SUM:
        tl.store(partial_sum_ptr + program * X + columns, total, mask=inside)


@triton.jit
def _turn_kernel(
    numbers_ptr, scale_ptr, weight_ptr, largest_ptr, turned_ptr, common_ptr, T, X, padded_T, parts,
    HAS_SCALES: tl.constexpr, HAS_WEIGHT: tl.constexpr, LEAST_COMMON_SCALE: tl.constexpr, PADDED_PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a tile [TILE_ROWS, TILE_COLUMNS], brought from the rows' scales to the common one, and transposed."""
    rows = tl.program_id(1).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.program_id(0).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (rows < T)[:, None] & (columns < X)[None, :]
    numbers = tl.load(numbers_ptr + rows[:, None] * X + columns[None, :], mask=inside, other=0.0)
    if HAS_SCALES:
        scale = tl.load(scale_ptr + rows, mask=rows < T, other=0.0)
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + rows, mask=rows < T, other=0.0)
        part = tl.arange(0, PADDED_PARTS)
        largest = tl.max(tl.load(largest_ptr + part, mask=part < parts, other=0.0), axis=0)
        common = tl.maximum(largest, LEAST_COMMON_SCALE)
        numbers = (numbers.to(tl.float32) * (scale / common)[:, None]).to(turned_ptr.dtype.element_ty)
        first_columns = tl.where(tl.program_id(1) == 0, X, 0)
        common_tile = tl.full((TILE_COLUMNS,), 0.0, tl.float32) + common
        tl.store(common_ptr + columns, common_tile, mask=columns < first_columns)
    written = (columns < X)[:, None] & (rows < padded_T)[None, :]
    tl.store(turned_ptr + columns[:, None] * padded_T + rows[None, :], tl.trans(numbers), mask=written)


def quantised_rows(x_TX: Tensor, weight_T: Tensor | None) -> tuple[Tensor, ...]:
    """Numbers, scales and largest scales of the rows; see the package's function of this name."""
    return _cast(x_TX, weight_T, has_sum=False)[:3]


def quantised_rows_and_sum(x_TX: Tensor, weight_T: Tensor | None) -> tuple[Tensor, ...]:
    """Numbers, scales, largest scales and sum of the rows; see the package's function of this name."""
    *rows, partial_sums = _cast(x_TX, weight_T, has_sum=True)
    # One partial sum a program, added in their order: the same bits in every run.
    return *rows, partial_sums.sum(0)


def _cast(x_TX: Tensor, weight_T: Tensor | None, has_sum: bool) -> tuple[Tensor, ...]:
    """Numbers and scales of the rows, the largest scale of each program's rows, and their sum."""
    x_TX = x_TX.contiguous()
    T, X = x_TX.shape
    numbers_TX = torch.empty_like(x_TX, dtype=torch.float8_e4m3fn)
    rows_per_program = triton.cdiv(T, programs(x_TX.device))
    grid, padded_X = triton.cdiv(T, rows_per_program), triton.next_power_of_2(X)
    scale_T, largest = scales(T, grid, x_TX.device)
    partial_sums = scale_T.new_empty(grid if has_sum else 0, X)
    _rows_kernel[(grid,)](
        x_TX,
        scale_T if weight_T is None else weight_T,
        numbers_TX,
        scale_T,
        largest,
        partial_sums,
        T,
        X,
        rows_per_program,
        HAS_WEIGHT=weight_T is not None,
        HAS_SUM=has_sum,
        LARGEST=LARGEST,
        LEAST_SCALE=LEAST_SCALE,
        PADDED_X=padded_X,
        num_warps=row_warps(padded_X),
    )
    return numbers_TX, scale_T, largest, partial_sums


def scales(T: int, grid: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the scales of rows, and for the largest of each program."""
    return torch.empty(T, dtype=torch.float32, device=device), torch.empty(grid, dtype=torch.float32, device=device)


def programs(device: torch.device) -> int:
    """Programs that take rows after each other."""
    return programs_of(device, INTERPRETER_PROGRAMS)


def row_warps(padded_X: int) -> int:
    """Warps of a program that holds a row: about 16 elements a thread."""
    return min(16, max(1, padded_X // 512))


def turned(
    numbers_TX: Tensor, scale_T: Tensor, largest: Tensor | None, weight_T: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor]:
    """Numbers and scale of the transpose; see the package's function of this name."""
    T, X = numbers_TX.shape
    padded_T = triton.cdiv(T, multiple) * multiple
    numbers_XT = numbers_TX.new_empty(X, padded_T)
    common_X, parts = scale_T, 1
    if largest is not None:
        common_X, parts = scale_T.new_empty(X), len(largest)
    grid = (triton.cdiv(X, TILE_COLUMNS), triton.cdiv(padded_T, TILE_ROWS))
    _turn_kernel[grid](
        numbers_TX,
        scale_T,
        scale_T if weight_T is None else weight_T,
        scale_T if largest is None else largest,
        numbers_XT,
        common_X,
        T,
        X,
        padded_T,
        parts,
        HAS_SCALES=largest is not None,
        HAS_WEIGHT=weight_T is not None,
        LEAST_COMMON_SCALE=LEAST_COMMON_SCALE,
        PADDED_PARTS=triton.next_power_of_2(parts),
        TILE_ROWS=TILE_ROWS,
        TILE_COLUMNS=TILE_COLUMNS,
    )
    return numbers_XT, common_X
