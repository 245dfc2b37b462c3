"""Triton kernels of the chunk scan: the states of Taylor attention before every chunk; `triton_attention.py` launches them.

Legend: T tokens, H heads, F feature dim, V value head dim, M tokens of a tile, X rows of a tile of the state.

A sequence is cut into segments of chunks. `scan_kernel` walks over the chunks of all segments at once and stores, for every
chunk, the state of what came before it in its segment; `combine_kernel` adds the segments up to the state before each one.
Rows are those of `triton_rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from based_megatron.kernels.taylor_attention.triton_rows import (
    as_columns,
    load_state,
    load_tile,
    load_vector,
    one_hot,
    public_rows,
    row_weights,
    second_factor,
    store_state,
    store_tile,
    sum_columns,
)
from based_megatron.kernels.triton_operand import head_ptr


@triton.jit
def scan_kernel(
    x, y, yz_ptr, ids, states_ptr, normalisers_ptr, moments_ptr, totals_ptr, T, H, chunks, segments, segment_chunks,
    F: tl.constexpr, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, V: tl.constexpr, PADDED_V: tl.constexpr, STORED_ROWS: tl.constexpr,
    SQUARE: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, ADJOINT: tl.constexpr,
    HAS_IDS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows of the states before the chunks of one segment, and of the moments of that segment.

    Forward (x = k, y = v): left to right, sum_j packed(k_j) [v_j; 1].
    Adjoint (x = q, y = g, yz = gz): right to left, sum_i packed(q_i) [g_i; gz_i].
    """
    row_tile, segment, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    x_ptr, y_ptr = head_ptr(x, b, h), head_ptr(y, b, h)
    yz_ptr += bh64 * T * 4
    ids_ptr = ids.ptr + b * ids.stride_b
    linear_rows: tl.constexpr = 0 if SQUARE else PERIOD
    constant: tl.constexpr = -1 if SQUARE else PERIOD + PERIOD * (PERIOD + 1) // 2
    dtype = x_ptr.dtype.element_ty

    rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.arange(0, PADDED_V)
    vector = tl.arange(0, PADDED_F)
    pick_first = tl.trans(one_hot(rows % PERIOD, PADDED_F, dtype))
    pick_second = tl.trans(one_hot(second_factor(rows, PERIOD, SQUARE), PADDED_F, dtype))
    is_linear = tl.where(rows < linear_rows, 1.0, 0.0)[:, None]
    is_constant = tl.where(rows == constant, 1.0, 0.0)[:, None]
    weights = row_weights(rows, PERIOD, F, SQUARE)
    state = tl.zeros([TILE_ROWS, PADDED_V], tl.float32)
    normaliser = tl.zeros([TILE_ROWS, 16], tl.float32)

    begin_chunk = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - begin_chunk)
    ones = as_columns(tl.full([TILE_TOKENS], 1.0, tl.float32), dtype)
    columns16 = tl.arange(0, 16)
    for step in range(0, count):
        if ADJOINT:
            chunk = begin_chunk + count - 1 - step
        else:
            chunk = begin_chunk + step
        begin = chunk * CHUNK_TOKENS
        out = (bh64 * chunks + chunk) * STORED_ROWS
        state_rows = states_ptr + out * V
        store_tile(state_rows, rows, V, STORED_ROWS, columns, V, state * weights[:, None])
        normaliser_columns = as_columns(sum_columns(normaliser) * weights, dtype)
        store_tile(normalisers_ptr + out * 4, rows, 4, STORED_ROWS, columns16, 4, normaliser_columns)
        if HAS_IDS:
            entering_id = tl.load(ids_ptr + tl.maximum(begin - 1, 0))
            last_id = tl.load(ids_ptr + tl.minimum(begin + CHUNK_TOKENS, T) - 1)
            keeps = tl.where(last_id == entering_id, 1.0, 0.0)
            state = state * keeps
            normaliser = normaliser * keeps
            seen_id = entering_id if ADJOINT else last_id
        # Unrolled, so that the loads of all tiles of the chunks ahead are under way.
        for tile in tl.static_range(CHUNK_TOKENS // TILE_TOKENS):
            tokens = begin + tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
            x_FM = tl.trans(load_tile(x_ptr, tokens, x.stride_t, T, vector, F, PADDED_F, EVEN))
            y_MV = load_tile(y_ptr, tokens, y.stride_t, T, columns, V, PADDED_V, EVEN)
            a = tl.dot(pick_first, x_FM, input_precision=PRECISION)
            b_plus = tl.dot(pick_second, x_FM, input_precision=PRECISION) + is_linear
            phi = a * b_plus + is_constant
            if HAS_IDS:
                token_ids = load_vector(ids_ptr, tokens, T, EVEN)
                phi = tl.where(((token_ids == seen_id) & (tokens < T))[None, :], phi, 0.0)
            elif not EVEN:
                phi = tl.where((tokens < T)[None, :], phi, 0.0)
            phi = phi.to(dtype)
            if ADJOINT:
                yz = load_tile(yz_ptr, tokens, 4, T, columns16, 4, 16, EVEN)
            else:
                yz = ones
            normaliser = tl.dot(phi, yz, normaliser, input_precision=PRECISION)
            state = tl.dot(phi, y_MV, state, input_precision=PRECISION)

    total = sum_columns(normaliser)
    if ADJOINT:
        state *= weights[:, None]
        total *= weights
    moments_rows = (bh64 * segments + segment) * STORED_ROWS
    store_tile(moments_ptr + moments_rows * V, rows, V, STORED_ROWS, columns, V, state)
    tl.store(totals_ptr + moments_rows + rows, total, mask=rows < STORED_ROWS)


@triton.jit
def combine_kernel(
    moments_ptr, totals_ptr, initial_ptr, starts_ptr, normalisers_ptr, end_ptr, ids, T, H, segments, segment_tokens,
    F: tl.constexpr, PERIOD: tl.constexpr, V: tl.constexpr, PADDED_V: tl.constexpr, STORED_ROWS: tl.constexpr, SQUARE: tl.constexpr,
    TILE_ROWS: tl.constexpr, ADJOINT: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr, ONLY_END: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows of the state before each segment, from all segments' moments: a gated sum, in a fixed order.

    With ONLY_END, the state after all segments instead. It is in the public layout, as the initial state is; the moments
    are in the order of the kernels' rows, and the states before the segments are stored as those of chunks are.
    """
    bh = tl.program_id(1).to(tl.int64)
    ids_ptr = ids.ptr + (bh // H) * ids.stride_b
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = tl.arange(0, PADDED_V)
    packed = public_rows(rows, PERIOD, F, SQUARE)
    elements: tl.constexpr = ((0 if SQUARE else 1 + F) + F * (F + 1) // 2) * (V + 1)
    dtype = starts_ptr.dtype.element_ty
    # Adjoint moments have the weights already.
    weights = tl.full([TILE_ROWS], 1.0, tl.float32) if ADJOINT else row_weights(rows, PERIOD, F, SQUARE)
    if HAS_INITIAL:
        state, total = load_state(initial_ptr + bh * elements, packed, columns, V)
    else:
        state = tl.zeros([TILE_ROWS, PADDED_V], tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
    for step in range(0, segments):
        segment = segments - 1 - step if ADJOINT else step
        here = bh * segments + segment
        if not ONLY_END:
            start_rows = starts_ptr + here * STORED_ROWS * V
            store_tile(start_rows, rows, V, STORED_ROWS, columns, V, state * weights[:, None])
            normaliser_columns = as_columns(total * weights, dtype)
            normaliser_rows = normalisers_ptr + here * STORED_ROWS * 4
            store_tile(normaliser_rows, rows, 4, STORED_ROWS, tl.arange(0, 16), 4, normaliser_columns)
        # The last moments reach the end alone.
        if ONLY_END or step < segments - 1:
            if HAS_IDS:
                entering_id = tl.load(ids_ptr + tl.maximum(segment * segment_tokens - 1, 0))
                last_id = tl.load(ids_ptr + tl.minimum((segment + 1) * segment_tokens, T) - 1)
                keeps = tl.where(last_id == entering_id, 1.0, 0.0)
                state *= keeps
                total *= keeps
            moments_rows = moments_ptr + here * STORED_ROWS * V
            state += load_tile(moments_rows, rows, V, STORED_ROWS, columns, V, PADDED_V, True)
            total += tl.load(totals_ptr + here * STORED_ROWS + rows)
    if ONLY_END:
        store_state(end_ptr + bh * elements, packed, columns, V, state, total)
