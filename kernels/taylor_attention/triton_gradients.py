"""Triton kernels of the gradients of Taylor attention: all tiles of all chunks at once; `triton_attention.py` launches them.

Legend: T tokens, H heads, F feature dim, V value head dim; I queries and J keys of a tile (M tokens of either), X rows of a tile
of the state.

As in `triton_outputs.py`, tokens of the own chunk are taken pair by pair, the others through the states of chunks and segments;
dk and dv take the adjoint states of the tokens after them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from based_megatron.kernels.taylor_attention.triton_rows import (
    as_columns,
    as_factors,
    features,
    first_factors,
    load_rows,
    load_tile,
    load_vector,
    one_hot,
    score_slopes,
    score_weights,
    second_factor,
    second_factors,
    start_limit,
    store_tile,
    sum_columns,
)
from based_megatron.kernels.triton_operand import head_ptr


@triton.jit
def output_gradients_kernel(
    do, o, inverse_z_ptr, g_ptr, gz_ptr, T, H,
    V: tl.constexpr, PADDED_V: tl.constexpr, TILE_TOKENS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the gradients to the numerators, g = do / Z, and to the normaliser, gz = -g.o as columns."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    tokens = tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    columns = tl.arange(0, PADDED_V)
    do_ptr, o_ptr = head_ptr(do, b, h), head_ptr(o, b, h)
    do_MV = load_tile(do_ptr, tokens, do.stride_t, T, columns, V, PADDED_V, EVEN)
    o_MV = load_tile(o_ptr, tokens, o.stride_t, T, columns, V, PADDED_V, EVEN)
    inverse_z_M = load_vector(inverse_z_ptr + bh64 * T, tokens, T, EVEN)
    g_MV = (do_MV.to(tl.float32) * inverse_z_M[:, None]).to(g_ptr.dtype.element_ty)
    # The rounded g: an error that both gradients share moves a gradient, but does not break their balance.
    gz_M = -tl.sum(g_MV.to(tl.float32) * o_MV.to(tl.float32), 1)
    store_tile(g_ptr + bh64 * T * V, tokens, V, T, columns, V, g_MV)
    gz_M16 = as_columns(gz_M, g_ptr.dtype.element_ty)
    store_tile(gz_ptr + bh64 * T * 4, tokens, 4, T, tl.arange(0, 16), 4, gz_M16)


@triton.jit
def to_second_factors(rows_X, PERIOD: tl.constexpr, SQUARE: tl.constexpr, PADDED_F: tl.constexpr, DTYPE: tl.constexpr):
    """[X, F] rows that add what flows to second factors up in their entries of x."""
    return tl.trans(one_hot(second_factor(rows_X, PERIOD, SQUARE), PADDED_F, DTYPE))


@triton.jit
def to_first_factors(TILE_ROWS: tl.constexpr, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, DTYPE: tl.constexpr):
    """[X, F] rows that add what flows to first factors up in their entries of x, in every tile of rows."""
    return tl.trans(one_hot(tl.arange(0, TILE_ROWS) % PERIOD, PADDED_F, DTYPE))


@triton.jit
def query_pairs(
    dq_IF, q_IF, g_IV, gz_I, k_JF, v_JV, queries, keys, ids_ptr, T, F: tl.constexpr, SQUARE: tl.constexpr,
    HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of a tile of queries and a tile of keys to dq."""
    s = tl.dot(q_IF, tl.trans(k_JF), input_precision=PRECISION)
    ds = tl.dot(g_IV, tl.trans(v_JV), input_precision=PRECISION) + gz_I[:, None]
    ds *= score_slopes(s, F, SQUARE)
    if DIAGONAL:
        ds = tl.where(queries[:, None] >= keys[None, :], ds, 0.0)
    if HAS_IDS:
        query_ids = load_vector(ids_ptr, queries, T, EVEN)
        ds = tl.where(query_ids[:, None] == load_vector(ids_ptr, keys, T, EVEN)[None, :], ds, 0.0)
    return tl.dot(ds.to(k_JF.dtype), k_JF, dq_IF, input_precision=PRECISION)


@triton.jit
def query_gradients_kernel(
    q, k, v, g_ptr, gz_ptr, ids, states_ptr, normalisers_ptr, starts_ptr, start_normalisers_ptr, dq,
    T, H, chunks, segments, segment_chunks,
    F: tl.constexpr, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, V: tl.constexpr, PADDED_V: tl.constexpr, STORED_ROWS: tl.constexpr,
    SQUARE: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, STATE_STAGES: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq of a tile of queries of one head, from the states before the chunks."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    q_ptr, k_ptr, v_ptr, dq_ptr = head_ptr(q, b, h), head_ptr(k, b, h), head_ptr(v, b, h), head_ptr(dq, b, h)
    ids_ptr = ids.ptr + b * ids.stride_b
    dtype = q_ptr.dtype.element_ty

    begin = tile * TILE_TOKENS
    chunk = begin // CHUNK_TOKENS
    chunk_begin = chunk * CHUNK_TOKENS
    queries = begin + tl.arange(0, TILE_TOKENS)
    vector = tl.arange(0, PADDED_F)
    columns = tl.arange(0, PADDED_V)
    q_IF = load_tile(q_ptr, queries, q.stride_t, T, vector, F, PADDED_F, EVEN)
    g_IV = load_tile(g_ptr + bh64 * T * V, queries, V, T, columns, V, PADDED_V, EVEN)
    gz_I16 = load_tile(gz_ptr + bh64 * T * 4, queries, 4, T, tl.arange(0, 16), 4, 16, EVEN)
    gz_I = sum_columns(gz_I16.to(tl.float32))
    state_index = bh64 * chunks + chunk
    states_ptr += state_index * STORED_ROWS * V
    normalisers_ptr += state_index * STORED_ROWS * 4
    if HAS_STARTS:
        segment = chunk // segment_chunks
        starts_ptr += (bh64 * segments + segment) * STORED_ROWS * V
        start_normalisers_ptr += (bh64 * segments + segment) * STORED_ROWS * 4
        segment_begin = segment * segment_chunks * CHUNK_TOKENS
        start_rows = start_limit(
            ids_ptr, tl.maximum(chunk_begin - 1, 0), tl.maximum(segment_begin - 1, 0), STORED_ROWS, HAS_IDS
        )

    dq_IF = tl.zeros([TILE_TOKENS, PADDED_F], tl.float32)
    da_IX = tl.zeros([TILE_TOKENS, TILE_ROWS], tl.float32)
    gz_factors_I16 = as_factors(gz_I, dtype)
    a_IX = first_factors(q_IF, TILE_ROWS, PERIOD, PADDED_F, PRECISION)
    for row0 in tl.range(0, STORED_ROWS, TILE_ROWS, num_stages=STATE_STAGES):
        rows = row0 + tl.arange(0, TILE_ROWS)
        state, normaliser = load_rows(states_ptr, normalisers_ptr, rows, STORED_ROWS, columns, V, PADDED_V, True)
        dphi_IX = tl.dot(gz_factors_I16, tl.trans(normaliser), input_precision=PRECISION)
        dphi_IX = tl.dot(g_IV, tl.trans(state), dphi_IX, input_precision=PRECISION)
        if HAS_STARTS:
            start, start_normaliser = load_rows(
                starts_ptr, start_normalisers_ptr, rows, start_rows, columns, V, PADDED_V, not HAS_IDS
            )
            dphi_IX = tl.dot(gz_factors_I16, tl.trans(start_normaliser), dphi_IX, input_precision=PRECISION)
            dphi_IX = tl.dot(g_IV, tl.trans(start), dphi_IX, input_precision=PRECISION)
        da_IX += dphi_IX * second_factors(q_IF, rows, PERIOD, PADDED_F, SQUARE, PRECISION)
        dq_IF = tl.dot(
            (dphi_IX * a_IX).to(dtype),
            to_second_factors(rows, PERIOD, SQUARE, PADDED_F, dtype),
            dq_IF,
            input_precision=PRECISION,
        )
    dq_IF = tl.dot(
        da_IX.to(dtype), to_first_factors(TILE_ROWS, PERIOD, PADDED_F, dtype), dq_IF, input_precision=PRECISION
    )
    if HAS_IDS:
        query_ids = load_vector(ids_ptr, queries, T, EVEN)
        dq_IF *= tl.where(query_ids == tl.load(ids_ptr + tl.maximum(chunk_begin - 1, 0)), 1.0, 0.0)[:, None]

    for key_begin in tl.range(chunk_begin, begin, TILE_TOKENS):
        keys = key_begin + tl.arange(0, TILE_TOKENS)
        k_JF = load_tile(k_ptr, keys, k.stride_t, T, vector, F, PADDED_F, EVEN)
        v_JV = load_tile(v_ptr, keys, v.stride_t, T, columns, V, PADDED_V, EVEN)
        dq_IF = query_pairs(
            dq_IF, q_IF, g_IV, gz_I, k_JF, v_JV, queries, keys, ids_ptr, T, F, SQUARE, HAS_IDS, False, EVEN, PRECISION
        )
    own_k_JF = load_tile(k_ptr, queries, k.stride_t, T, vector, F, PADDED_F, EVEN)
    own_v_JV = load_tile(v_ptr, queries, v.stride_t, T, columns, V, PADDED_V, EVEN)
    dq_IF = query_pairs(
        dq_IF, q_IF, g_IV, gz_I, own_k_JF, own_v_JV,
        queries, queries, ids_ptr, T, F, SQUARE, HAS_IDS, True, EVEN, PRECISION,
    )  # fmt: skip
    store_tile(dq_ptr, queries, dq.stride_t, T, vector, F, dq_IF)


@triton.jit
def key_pairs(
    dk_JF, dv_JV, k_JF, v_JV, ones_J16, q_IF, g_IV, gz_I16, queries, keys, ids_ptr, T, F: tl.constexpr,
    SQUARE: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of a tile of queries and a tile of keys to dk and dv."""
    s = tl.dot(k_JF, tl.trans(q_IF), input_precision=PRECISION)
    ds = tl.dot(ones_J16, tl.trans(gz_I16), input_precision=PRECISION)
    ds = tl.dot(v_JV, tl.trans(g_IV), ds, input_precision=PRECISION)
    ds *= score_slopes(s, F, SQUARE)
    w = score_weights(s, F, SQUARE)
    if DIAGONAL:
        visible = queries[None, :] >= keys[:, None]
        ds = tl.where(visible, ds, 0.0)
        w = tl.where(visible, w, 0.0)
    if HAS_IDS:
        key_ids = load_vector(ids_ptr, keys, T, EVEN)
        visible = key_ids[:, None] == load_vector(ids_ptr, queries, T, EVEN)[None, :]
        ds = tl.where(visible, ds, 0.0)
        w = tl.where(visible, w, 0.0)
    # Queries beyond T: g and gz are zeros there, and so is all that they give.
    dv_JV = tl.dot(w.to(g_IV.dtype), g_IV, dv_JV, input_precision=PRECISION)
    return tl.dot(ds.to(q_IF.dtype), q_IF, dk_JF, input_precision=PRECISION), dv_JV


@triton.jit
def key_gradients_kernel(
    q, k, v, g_ptr, gz_ptr, ids, states_ptr, normalisers_ptr, starts_ptr, start_normalisers_ptr, dk, dv,
    T, H, chunks, segments, segment_chunks,
    F: tl.constexpr, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, V: tl.constexpr, PADDED_V: tl.constexpr, STORED_ROWS: tl.constexpr,
    SQUARE: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr, STATE_STAGES: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of a tile of keys of one head, from the adjoint states after the chunks."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    k_ptr, v_ptr, dk_ptr, dv_ptr = head_ptr(k, b, h), head_ptr(v, b, h), head_ptr(dk, b, h), head_ptr(dv, b, h)
    ids_ptr = ids.ptr + b * ids.stride_b
    dtype = k_ptr.dtype.element_ty

    begin = tile * TILE_TOKENS
    chunk = begin // CHUNK_TOKENS
    chunk_end = tl.minimum((chunk + 1) * CHUNK_TOKENS, T)
    keys = begin + tl.arange(0, TILE_TOKENS)
    vector = tl.arange(0, PADDED_F)
    columns = tl.arange(0, PADDED_V)
    k_JF = load_tile(k_ptr, keys, k.stride_t, T, vector, F, PADDED_F, EVEN)
    v_JV = load_tile(v_ptr, keys, v.stride_t, T, columns, V, PADDED_V, EVEN)
    # Loaded early: a program is short, and would wait for each load in turn.
    q_ptr = head_ptr(q, b, h)
    g_ptr += bh64 * T * V
    gz_ptr += bh64 * T * 4
    columns16 = tl.arange(0, 16)
    own_q_IF = load_tile(q_ptr, keys, q.stride_t, T, vector, F, PADDED_F, EVEN)
    own_g_IV = load_tile(g_ptr, keys, V, T, columns, V, PADDED_V, EVEN)
    own_gz_I16 = load_tile(gz_ptr, keys, 4, T, columns16, 4, 16, EVEN)
    state_index = bh64 * chunks + chunk
    states_ptr += state_index * STORED_ROWS * V
    normalisers_ptr += state_index * STORED_ROWS * 4
    if HAS_STARTS:
        segment = chunk // segment_chunks
        starts_ptr += (bh64 * segments + segment) * STORED_ROWS * V
        start_normalisers_ptr += (bh64 * segments + segment) * STORED_ROWS * 4
        segment_end = tl.minimum((segment + 1) * segment_chunks * CHUNK_TOKENS, T)
        start_rows = start_limit(ids_ptr, chunk_end - 1, segment_end - 1, STORED_ROWS, HAS_IDS)

    dk_JF = tl.zeros([TILE_TOKENS, PADDED_F], tl.float32)
    dv_JV = tl.zeros([TILE_TOKENS, PADDED_V], tl.float32)
    da_JX = tl.zeros([TILE_TOKENS, TILE_ROWS], tl.float32)
    ones_J16 = as_factors(tl.full([TILE_TOKENS], 1.0, tl.float32), dtype)
    a_JX = first_factors(k_JF, TILE_ROWS, PERIOD, PADDED_F, PRECISION)
    for row0 in tl.range(0, STORED_ROWS, TILE_ROWS, num_stages=STATE_STAGES):
        rows = row0 + tl.arange(0, TILE_ROWS)
        b_plus_JX = second_factors(k_JF, rows, PERIOD, PADDED_F, SQUARE, PRECISION)
        phi_JX = features(a_JX, b_plus_JX, rows, PERIOD, SQUARE).to(dtype)
        dphi_JX = tl.zeros([TILE_TOKENS, TILE_ROWS], tl.float32)
        state, normaliser = load_rows(states_ptr, normalisers_ptr, rows, STORED_ROWS, columns, V, PADDED_V, True)
        dv_JV = tl.dot(phi_JX, state, dv_JV, input_precision=PRECISION)
        dphi_JX = tl.dot(ones_J16, tl.trans(normaliser), dphi_JX, input_precision=PRECISION)
        dphi_JX = tl.dot(v_JV, tl.trans(state), dphi_JX, input_precision=PRECISION)
        if HAS_STARTS:
            start, start_normaliser = load_rows(
                starts_ptr, start_normalisers_ptr, rows, start_rows, columns, V, PADDED_V, not HAS_IDS
            )
            dv_JV = tl.dot(phi_JX, start, dv_JV, input_precision=PRECISION)
            dphi_JX = tl.dot(ones_J16, tl.trans(start_normaliser), dphi_JX, input_precision=PRECISION)
            dphi_JX = tl.dot(v_JV, tl.trans(start), dphi_JX, input_precision=PRECISION)
        da_JX += dphi_JX * b_plus_JX
        dk_JF = tl.dot(
            (dphi_JX * a_JX).to(dtype),
            to_second_factors(rows, PERIOD, SQUARE, PADDED_F, dtype),
            dk_JF,
            input_precision=PRECISION,
        )
    dk_JF = tl.dot(
        da_JX.to(dtype), to_first_factors(TILE_ROWS, PERIOD, PADDED_F, dtype), dk_JF, input_precision=PRECISION
    )
    if HAS_IDS:
        key_ids = load_vector(ids_ptr, keys, T, EVEN)
        writes = tl.where(key_ids == tl.load(ids_ptr + chunk_end - 1), 1.0, 0.0)
        dk_JF *= writes[:, None]
        dv_JV *= writes[:, None]

    dk_JF, dv_JV = key_pairs(
        dk_JF, dv_JV, k_JF, v_JV, ones_J16, own_q_IF, own_g_IV, own_gz_I16, keys, keys, ids_ptr, T,
        F, SQUARE, HAS_IDS, True, EVEN, PRECISION,
    )  # fmt: skip
    for query_begin in tl.range(begin + TILE_TOKENS, chunk_end, TILE_TOKENS):
        queries = query_begin + tl.arange(0, TILE_TOKENS)
        q_IF = load_tile(q_ptr, queries, q.stride_t, T, vector, F, PADDED_F, EVEN)
        g_IV = load_tile(g_ptr, queries, V, T, columns, V, PADDED_V, EVEN)
        gz_I16 = load_tile(gz_ptr, queries, 4, T, columns16, 4, 16, EVEN)
        dk_JF, dv_JV = key_pairs(
            dk_JF, dv_JV, k_JF, v_JV, ones_J16, q_IF, g_IV, gz_I16,
            queries, keys, ids_ptr, T, F, SQUARE, HAS_IDS, False, EVEN, PRECISION,
        )  # fmt: skip

    store_tile(dk_ptr, keys, dk.stride_t, T, vector, F, dk_JF)
    store_tile(dv_ptr, keys, dv.stride_t, T, columns, V, dv_JV)
