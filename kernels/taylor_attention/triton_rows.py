"""Rows of a Taylor state inside the kernels, and how tiles and states move.

Legend: F feature dim, V value head dim, M tokens of a tile, X rows of a tile of the state.

Packed features never reach memory. They are products of two factors, picked out of a token's vector x by products with one-hot
columns: exact, and left in the registers where the next matrix product reads them. Rows of a state, with P = F rounded up to a
power of two (`PERIOD`), differ from the public packed order:

    r < P                     x_r
    P + s P + a               x_a x_{(a+s) mod P}, for s = 0 .. P/2 (the last with a < P/2): every pair once
    the next row              1, then rows of zeros

so that the first factor of row r is x_{r mod P} in every tile, and neither factor needs a table. Squares alone (`SQUARE`) have
the pairs only, from row 0 on.

States of chunks carry the weights of the rows: 1/sqrt(F), 1/(2F) for squares, 1/F for other pairs, 1; of squares alone 1/F and
2/F. What belongs to the normaliser is a vector in fp32; `as_columns` splits it into two rounded parts, so that matrix products can take it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one_hot(index_X, PADDED_F: tl.constexpr, DTYPE: tl.constexpr):
    """[PADDED_F, X] columns that pick entry index[x]; a column of zeros where it is negative."""
    return tl.where(tl.arange(0, PADDED_F)[:, None] == index_X[None, :], 1.0, 0.0).to(DTYPE)


@triton.jit
def score_weights(s, F: tl.constexpr, SQUARE: tl.constexpr):
    """w from q.k."""
    scale: tl.constexpr = 1.0 / F**0.5
    if SQUARE:
        return s * s * (scale * scale)
    return s * (s * (0.5 * scale * scale) + scale) + 1.0


@triton.jit
def score_slopes(s, F: tl.constexpr, SQUARE: tl.constexpr):
    """dw / d(q.k) from q.k."""
    scale: tl.constexpr = 1.0 / F**0.5
    if SQUARE:
        return s * (2.0 * scale * scale)
    return s * (scale * scale) + scale


@triton.jit
def second_factor(rows_X, PERIOD: tl.constexpr, SQUARE: tl.constexpr):
    """Index of the second factor of each row; -1 where the row is no pair."""
    pairs: tl.constexpr = PERIOD * (PERIOD + 1) // 2
    if SQUARE:
        return tl.where(rows_X < pairs, (rows_X + rows_X // PERIOD) % PERIOD, -1)
    shift = rows_X // PERIOD - 1
    is_pair = (rows_X >= PERIOD) & (rows_X < PERIOD + pairs)
    return tl.where(is_pair, (rows_X + shift) % PERIOD, -1)


@triton.jit
def row_weights(rows_X, PERIOD: tl.constexpr, F: tl.constexpr, SQUARE: tl.constexpr):
    """Factors that turn packed(q).packed(k) into w."""
    scale: tl.constexpr = 1.0 / F**0.5
    if SQUARE:
        return tl.where(rows_X < PERIOD, scale * scale, 2.0 * scale * scale)
    pairs: tl.constexpr = PERIOD * (PERIOD + 1) // 2
    pair_weights = tl.where(rows_X < 2 * PERIOD, 0.5 * scale * scale, scale * scale)
    return tl.where(rows_X < PERIOD, scale, tl.where(rows_X < PERIOD + pairs, pair_weights, 1.0))


@triton.jit
def public_rows(rows_X, PERIOD: tl.constexpr, F: tl.constexpr, SQUARE: tl.constexpr):
    """Place of a row in the public packed order [1 | x_a | x_a x_b, a <= b]; -1 for rows of zeros."""
    pairs: tl.constexpr = PERIOD * (PERIOD + 1) // 2
    first = rows_X % PERIOD
    second = second_factor(rows_X, PERIOD, SQUARE)
    low = tl.minimum(first, second)
    high = tl.maximum(first, second)
    if SQUARE:
        return tl.where((rows_X >= pairs) | (high >= F), -1, low * F - low * (low - 1) // 2 + high - low)
    pair = 1 + F + low * F - low * (low - 1) // 2 + high - low
    row = tl.where(rows_X < PERIOD, 1 + first, tl.where(rows_X < PERIOD + pairs, pair, 0))
    return tl.where((rows_X > PERIOD + pairs) | ((rows_X < PERIOD + pairs) & (tl.maximum(first, high) >= F)), -1, row)


@triton.jit
def first_factors(x_MF, TILE_ROWS: tl.constexpr, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, PRECISION: tl.constexpr):
    """First factors [M, X] fp32, the same for every tile of rows."""
    picks = one_hot(tl.arange(0, TILE_ROWS) % PERIOD, PADDED_F, x_MF.dtype)
    return tl.dot(x_MF, picks, input_precision=PRECISION)


@triton.jit
def second_factors(
    x_MF, rows_X, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr
):
    """Second factors [M, X] fp32 of a tile of rows; zero in the constant row."""
    picks = one_hot(second_factor(rows_X, PERIOD, SQUARE), PADDED_F, x_MF.dtype)
    if SQUARE:
        return tl.dot(x_MF, picks, input_precision=PRECISION)
    linear = tl.where(rows_X < PERIOD, 1.0, 0.0)
    return tl.dot(x_MF, picks, input_precision=PRECISION) + linear[None, :]


@triton.jit
def features(a_MX, b_MX, rows_X, PERIOD: tl.constexpr, SQUARE: tl.constexpr):
    """packed(x) of a tile of rows from its factors."""
    if SQUARE:
        return a_MX * b_MX
    constant: tl.constexpr = PERIOD + PERIOD * (PERIOD + 1) // 2
    return a_MX * b_MX + tl.where(rows_X == constant, 1.0, 0.0)[None, :]


@triton.jit
def as_columns(x_X, DTYPE: tl.constexpr):
    """[X, 16] that brings a vector of fp32 into matrix products: columns 0 and 1 add up to it, column 2 is column 0."""
    column = tl.arange(0, 16)[None, :]
    high = x_X.to(DTYPE)
    low = (x_X - high.to(tl.float32)).to(DTYPE)
    return tl.where((column == 0) | (column == 2), high[:, None], tl.where(column == 1, low[:, None], 0.0).to(DTYPE))


@triton.jit
def as_factors(x_X, DTYPE: tl.constexpr):
    """[X, 16] so that as_factors(x) @ as_columns(y)^T is the outer product of x and y, to twice the digits of DTYPE."""
    column = tl.arange(0, 16)[None, :]
    high = x_X.to(DTYPE)
    low = (x_X - high.to(tl.float32)).to(DTYPE)
    return tl.where(column < 2, high[:, None], tl.where(column == 2, low[:, None], 0.0).to(DTYPE))


@triton.jit
def sum_columns(x_M16):
    """[M] from a product with as_columns."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] < 2, x_M16, 0.0), 1)


@triton.jit
def load_tile(
    ptr, rows_M, stride, limit, columns_X, COLUMNS: tl.constexpr, PADDED_COLUMNS: tl.constexpr, EVEN: tl.constexpr
):
    """[M, X] of a matrix with dense rows; zeros outside of it. EVEN says that no row is outside."""
    ptrs = ptr + rows_M.to(tl.int64)[:, None] * stride + columns_X[None, :]
    if EVEN and COLUMNS == PADDED_COLUMNS:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(rows_M < limit)[:, None] & (columns_X < COLUMNS)[None, :], other=0.0)


@triton.jit
def load_vector(ptr, rows_M, limit, EVEN: tl.constexpr):
    """[M] entries of a vector; zeros outside of it."""
    if EVEN:
        return tl.load(ptr + rows_M)
    return tl.load(ptr + rows_M, mask=rows_M < limit, other=0)


@triton.jit
def store_tile(ptr, rows_M, stride, limit, columns_X, COLUMNS: tl.constexpr, x_MX):
    """Stores the part of [M, X] that is inside of the matrix."""
    tl.store(
        ptr + rows_M.to(tl.int64)[:, None] * stride + columns_X[None, :], x_MX.to(ptr.dtype.element_ty),
        mask=(rows_M < limit)[:, None] & (columns_X < COLUMNS)[None, :],
    )  # fmt: skip


@triton.jit
def load_state(ptr, packed_X, columns_V, V: tl.constexpr):
    """Rows of a state [R, V + 1] in the public layout: values [X, V] and the last column [X]; zeros where packed < 0."""
    rows = ptr + packed_X * (V + 1)
    mask = (packed_X >= 0)[:, None] & (columns_V < V)[None, :]
    values = tl.load(rows[:, None] + columns_V[None, :], mask=mask, other=0.0)
    return values, tl.load(rows + V, mask=packed_X >= 0, other=0.0)


@triton.jit
def store_state(ptr, packed_X, columns_V, V: tl.constexpr, values_XV, total_X):
    """The reverse of `load_state`."""
    rows = ptr + packed_X * (V + 1)
    mask = (packed_X >= 0)[:, None] & (columns_V < V)[None, :]
    tl.store(rows[:, None] + columns_V[None, :], values_XV, mask=mask)
    tl.store(rows + V, total_X, mask=packed_X >= 0)


@triton.jit
def load_rows(
    states_ptr, normalisers_ptr, rows_X, limit, columns_V, V: tl.constexpr, PADDED_V: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of rows of a stored state: values [X, V], and normalisers as columns [X, 16]; WHOLE ignores the limit."""
    values = load_tile(states_ptr, rows_X, V, limit, columns_V, V, PADDED_V, WHOLE)
    return values, load_tile(normalisers_ptr, rows_X, 4, limit, tl.arange(0, 16), 4, 16, WHOLE)


@triton.jit
def start_limit(ids_ptr, edge_token, segment_edge_token, STORED_ROWS: tl.constexpr, HAS_IDS: tl.constexpr):
    """Number of rows that a chunk reads of its segment's start: none if another document began in between.

    The tokens are those whose documents enter the chunk and the segment. What reads a chunk's state compares with the
    former; ids do not decrease, so equal ids leave nothing else between.
    """
    if HAS_IDS:
        return tl.where(tl.load(ids_ptr + edge_token) == tl.load(ids_ptr + segment_edge_token), STORED_ROWS, 0)
    return STORED_ROWS
