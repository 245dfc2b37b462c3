"""Triton kernels that sweep a sequence: the states of Taylor attention before every chunk; `triton_attention.py` launches them.

Legend: B batch, T sequence, H heads, F feature dim, V value head dim, N chunks, M tokens of a tile, X rows of a block.

A sequence is cut into segments of chunks. `sweep` walks over the chunks of all segments at once and leaves, for every
chunk, the state of what came before it in its segment; `combine` adds the segments up to the state before each one.
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


@triton.jit
def sweep(
    x_ptr, y_ptr, yz_ptr, ids_ptr, states_ptr, normalisers_ptr, moments_ptr, totals_ptr,
    x_stride_b, x_stride_t, x_stride_h, y_stride_b, y_stride_t, y_stride_h, ids_stride_b,
    T, H, chunks, segments, segment_chunks,
    feature_dim: tl.constexpr, period: tl.constexpr, width: tl.constexpr, value_dim: tl.constexpr,
    value_width: tl.constexpr, rows_stored: tl.constexpr, block_rows: tl.constexpr, chunk_tokens: tl.constexpr,
    tile_tokens: tl.constexpr, adjoint: tl.constexpr, has_ids: tl.constexpr, even: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """One block of rows of what the chunks before a chunk in its segment add up to, and of what the whole segment does.

    Forward (x = k, y = v): left to right, sum_j packed(k_j) [v_j; 1].
    Adjoint (x = q, y = g, yz = gz): right to left, sum_i packed(q_i) [g_i; gz_i].
    """
    block, segment, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    x_ptr += b * x_stride_b + h * x_stride_h
    y_ptr += b * y_stride_b + h * y_stride_h
    yz_ptr += bh64 * T * 4
    ids_ptr += b * ids_stride_b
    constant: tl.constexpr = period + period * (period + 1) // 2
    dtype = x_ptr.dtype.element_ty

    rows = block * block_rows + tl.arange(0, block_rows)
    columns = tl.arange(0, value_width)
    vector = tl.arange(0, width)
    pick_first = tl.trans(one_hot(rows % period, width, dtype))
    pick_second = tl.trans(one_hot(second_factor(rows, period), width, dtype))
    is_linear = tl.where(rows < period, 1.0, 0.0)[:, None]
    is_constant = tl.where(rows == constant, 1.0, 0.0)[:, None]
    weights = row_weights(rows, period, feature_dim)
    state = tl.zeros([block_rows, value_width], tl.float32)
    normaliser = tl.zeros([block_rows, 16], tl.float32)

    begin_chunk = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - begin_chunk)
    ones = as_columns(tl.full([tile_tokens], 1.0, tl.float32), dtype)
    columns16 = tl.arange(0, 16)
    for step in range(0, count):
        if adjoint:
            chunk = begin_chunk + count - 1 - step
        else:
            chunk = begin_chunk + step
        begin = chunk * chunk_tokens
        out = (bh64 * chunks + chunk) * rows_stored
        state_rows = states_ptr + out * value_dim
        store_tile(state_rows, rows, value_dim, rows_stored, columns, value_dim, state * weights[:, None])
        normaliser_columns = as_columns(sum_columns(normaliser) * weights, dtype)
        store_tile(normalisers_ptr + out * 4, rows, 4, rows_stored, columns16, 4, normaliser_columns)
        if has_ids:
            carried_id = tl.load(ids_ptr + tl.maximum(begin - 1, 0))
            last_id = tl.load(ids_ptr + tl.minimum(begin + chunk_tokens, T) - 1)
            keeps = tl.where(last_id == carried_id, 1.0, 0.0)
            state = state * keeps
            normaliser = normaliser * keeps
            seen_id = carried_id if adjoint else last_id
        # Unrolled, so that the loads of all tiles of the chunks ahead are under way.
        for tile in tl.static_range(chunk_tokens // tile_tokens):
            tokens = begin + tile * tile_tokens + tl.arange(0, tile_tokens)
            x_t = tl.trans(load_tile(x_ptr, tokens, x_stride_t, T, vector, feature_dim, width, even))
            y = load_tile(y_ptr, tokens, y_stride_t, T, columns, value_dim, value_width, even)
            a = tl.dot(pick_first, x_t, input_precision=precision)
            b_plus = tl.dot(pick_second, x_t, input_precision=precision) + is_linear
            phi = a * b_plus + is_constant
            if has_ids:
                ids = load_vector(ids_ptr, tokens, T, even)
                phi = tl.where(((ids == seen_id) & (tokens < T))[None, :], phi, 0.0)
            elif not even:
                phi = tl.where((tokens < T)[None, :], phi, 0.0)
            operand = phi.to(dtype)
            if adjoint:
                yz = load_tile(yz_ptr, tokens, 4, T, columns16, 4, 16, even)
            else:
                yz = ones
            normaliser = tl.dot(operand, yz, normaliser, input_precision=precision)
            state = tl.dot(operand, y, state, input_precision=precision)

    total = sum_columns(normaliser)
    if adjoint:
        state *= weights[:, None]
        total *= weights
    moments_rows = (bh64 * segments + segment) * rows_stored
    store_tile(moments_ptr + moments_rows * value_dim, rows, value_dim, rows_stored, columns, value_dim, state)
    tl.store(totals_ptr + moments_rows + rows, total, mask=rows < rows_stored)


@triton.jit
def combine(
    moments_ptr, totals_ptr, initial_ptr, starts_ptr, normalisers_ptr, end_ptr, ids_ptr, ids_stride_b, T, H, segments,
    segment_tokens,
    feature_dim: tl.constexpr, period: tl.constexpr, value_dim: tl.constexpr, value_width: tl.constexpr,
    rows_stored: tl.constexpr, block_rows: tl.constexpr, adjoint: tl.constexpr, has_initial: tl.constexpr,
    has_ids: tl.constexpr, only_end: tl.constexpr,
):  # fmt: skip
    """One block of rows of the state before each segment, from all segments' moments: a gated sum, in a fixed order.

    With `only_end`, the state after all segments instead. It is in the public layout, as the initial state is; the moments
    are in the order of the kernels' rows, and the states before the segments are stored as those of chunks are.
    """
    bh = tl.program_id(1).to(tl.int64)
    ids_ptr += (bh // H) * ids_stride_b
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.arange(0, value_width)
    packed = public_rows(rows, period, feature_dim)
    elements: tl.constexpr = (1 + feature_dim + feature_dim * (feature_dim + 1) // 2) * (value_dim + 1)
    dtype = starts_ptr.dtype.element_ty
    # Adjoint moments have the weights already.
    weights = tl.full([block_rows], 1.0, tl.float32) if adjoint else row_weights(rows, period, feature_dim)
    if has_initial:
        state, total = load_state(initial_ptr + bh * elements, packed, columns, value_dim)
    else:
        state = tl.zeros([block_rows, value_width], tl.float32)
        total = tl.zeros([block_rows], tl.float32)
    for step in range(0, segments):
        segment = segments - 1 - step if adjoint else step
        here = bh * segments + segment
        if not only_end:
            start_rows = starts_ptr + here * rows_stored * value_dim
            store_tile(start_rows, rows, value_dim, rows_stored, columns, value_dim, state * weights[:, None])
            normaliser_columns = as_columns(total * weights, dtype)
            normaliser_rows = normalisers_ptr + here * rows_stored * 4
            store_tile(normaliser_rows, rows, 4, rows_stored, tl.arange(0, 16), 4, normaliser_columns)
        # The last moments reach the end alone.
        if only_end or step < segments - 1:
            if has_ids:
                carried_id = tl.load(ids_ptr + tl.maximum(segment * segment_tokens - 1, 0))
                last_id = tl.load(ids_ptr + tl.minimum((segment + 1) * segment_tokens, T) - 1)
                keeps = tl.where(last_id == carried_id, 1.0, 0.0)
                state *= keeps
                total *= keeps
            moments_rows = moments_ptr + here * rows_stored * value_dim
            state += load_tile(moments_rows, rows, value_dim, rows_stored, columns, value_dim, value_width, True)
            total += tl.load(totals_ptr + here * rows_stored + rows)
    if only_end:
        store_state(end_ptr + bh * elements, packed, columns, value_dim, state, total)
