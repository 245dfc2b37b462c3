"""Triton kernel of the outputs of Taylor attention: all tiles of all chunks at once; `triton_attention.py` launches it.

Legend: T tokens, H heads, F feature dim, V value head dim; I queries and J keys of a tile (M tokens of either), X rows of a tile
of the state.

Tokens of the own chunk are taken pair by pair, those before through the chunk's state, those before the segment through the
segment's (`triton_scan.py` makes both). Where a row of the batch is one segment that nothing enters, no such second state exists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from based_megatron.kernels.taylor_attention.triton_rows import (
    as_columns,
    features,
    first_factors,
    load_rows,
    load_tile,
    load_vector,
    score_weights,
    second_factors,
    start_limit,
    store_tile,
    sum_columns,
)
from based_megatron.kernels.triton_operand import head_ptr


@triton.jit
def output_pairs(
    total_IV, z_I16, q_IF, k_JF, v_JV, ones_J16, queries, keys, ids_ptr, T, F: tl.constexpr, SQUARE: tl.constexpr,
    HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of a tile of queries and a tile of keys to the numerators and the normaliser."""
    s = tl.dot(q_IF, tl.trans(k_JF), input_precision=PRECISION)
    w = score_weights(s, F, SQUARE)
    if DIAGONAL:
        w = tl.where(queries[:, None] >= keys[None, :], w, 0.0)
    if HAS_IDS:
        query_ids = load_vector(ids_ptr, queries, T, EVEN)
        w = tl.where(query_ids[:, None] == load_vector(ids_ptr, keys, T, EVEN)[None, :], w, 0.0)
    w = w.to(v_JV.dtype)
    z_I16 = tl.dot(w, ones_J16, z_I16, input_precision=PRECISION)
    return tl.dot(w, v_JV, total_IV, input_precision=PRECISION), z_I16


@triton.jit
def outputs_kernel(
    q, k, v, ids, states_ptr, normalisers_ptr, starts_ptr, start_normalisers_ptr, o, inverse_z_ptr,
    T, H, chunks, segments, segment_chunks,
    F: tl.constexpr, PERIOD: tl.constexpr, PADDED_F: tl.constexpr, V: tl.constexpr, PADDED_V: tl.constexpr, STORED_ROWS: tl.constexpr,
    SQUARE: tl.constexpr, EPSILON: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK_TOKENS: tl.constexpr, TILE_TOKENS: tl.constexpr,
    STATE_STAGES: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: o and 1/Z of a tile of queries of one head."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    q_ptr, k_ptr, v_ptr, o_ptr = head_ptr(q, b, h), head_ptr(k, b, h), head_ptr(v, b, h), head_ptr(o, b, h)
    ids_ptr = ids.ptr + b * ids.stride_b
    dtype = q_ptr.dtype.element_ty

    begin = tile * TILE_TOKENS
    chunk = begin // CHUNK_TOKENS
    chunk_begin = chunk * CHUNK_TOKENS
    queries = begin + tl.arange(0, TILE_TOKENS)
    vector = tl.arange(0, PADDED_F)
    columns = tl.arange(0, PADDED_V)
    q_IF = load_tile(q_ptr, queries, q.stride_t, T, vector, F, PADDED_F, EVEN)
    # Loaded early: a program is short, and would wait for each load in turn.
    own_k_JF = load_tile(k_ptr, queries, k.stride_t, T, vector, F, PADDED_F, EVEN)
    own_v_JV = load_tile(v_ptr, queries, v.stride_t, T, columns, V, PADDED_V, EVEN)
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

    total_IV = tl.zeros([TILE_TOKENS, PADDED_V], tl.float32)
    z_I16 = tl.zeros([TILE_TOKENS, 16], tl.float32)
    a_IX = first_factors(q_IF, TILE_ROWS, PERIOD, PADDED_F, PRECISION)
    # A small state is loaded at once, which is faster; of a larger one, that would fill the registers.
    if STORED_ROWS * PADDED_V <= 192 * 64 and not HAS_STARTS:
        parts = ()
        for part in tl.static_range(STORED_ROWS // TILE_ROWS):
            rows = part * TILE_ROWS + tl.arange(0, TILE_ROWS)
            parts += (load_rows(states_ptr, normalisers_ptr, rows, STORED_ROWS, columns, V, PADDED_V, True),)
        for part in tl.static_range(STORED_ROWS // TILE_ROWS):
            rows = part * TILE_ROWS + tl.arange(0, TILE_ROWS)
            phi_IX = features(
                a_IX, second_factors(q_IF, rows, PERIOD, PADDED_F, SQUARE, PRECISION), rows, PERIOD, SQUARE
            ).to(dtype)
            z_I16 = tl.dot(phi_IX, parts[part][1], z_I16, input_precision=PRECISION)
            total_IV = tl.dot(phi_IX, parts[part][0], total_IV, input_precision=PRECISION)
    else:
        for row0 in tl.range(0, STORED_ROWS, TILE_ROWS, num_stages=STATE_STAGES):
            rows = row0 + tl.arange(0, TILE_ROWS)
            state, normaliser = load_rows(states_ptr, normalisers_ptr, rows, STORED_ROWS, columns, V, PADDED_V, True)
            phi_IX = features(
                a_IX, second_factors(q_IF, rows, PERIOD, PADDED_F, SQUARE, PRECISION), rows, PERIOD, SQUARE
            ).to(dtype)
            z_I16 = tl.dot(phi_IX, normaliser, z_I16, input_precision=PRECISION)
            total_IV = tl.dot(phi_IX, state, total_IV, input_precision=PRECISION)
            if HAS_STARTS:
                start, start_normaliser = load_rows(
                    starts_ptr, start_normalisers_ptr, rows, start_rows, columns, V, PADDED_V, not HAS_IDS
                )
                z_I16 = tl.dot(phi_IX, start_normaliser, z_I16, input_precision=PRECISION)
                total_IV = tl.dot(phi_IX, start, total_IV, input_precision=PRECISION)
    if HAS_IDS:
        query_ids = load_vector(ids_ptr, queries, T, EVEN)
        reads = tl.where(query_ids == tl.load(ids_ptr + tl.maximum(chunk_begin - 1, 0)), 1.0, 0.0)
        total_IV *= reads[:, None]
        z_I16 *= reads[:, None]

    ones_J16 = as_columns(tl.full([TILE_TOKENS], 1.0, tl.float32), dtype)
    for key_begin in tl.range(chunk_begin, begin, TILE_TOKENS):
        keys = key_begin + tl.arange(0, TILE_TOKENS)
        k_JF = load_tile(k_ptr, keys, k.stride_t, T, vector, F, PADDED_F, EVEN)
        v_JV = load_tile(v_ptr, keys, v.stride_t, T, columns, V, PADDED_V, EVEN)
        total_IV, z_I16 = output_pairs(
            total_IV, z_I16, q_IF, k_JF, v_JV, ones_J16,
            queries, keys, ids_ptr, T, F, SQUARE, HAS_IDS, False, EVEN, PRECISION,
        )  # fmt: skip
    total_IV, z_I16 = output_pairs(
        total_IV, z_I16, q_IF, own_k_JF, own_v_JV, ones_J16,
        queries, queries, ids_ptr, T, F, SQUARE, HAS_IDS, True, EVEN, PRECISION,
    )  # fmt: skip

    z_I = sum_columns(z_I16)
    if SQUARE:
        z_I += EPSILON
    inverse_z_I = 1.0 / z_I
    store_tile(o_ptr, queries, o.stride_t, T, columns, V, total_IV * inverse_z_I[:, None])
    tl.store(inverse_z_ptr + bh64 * T + queries, inverse_z_I, mask=queries < T)
