"""Triton kernels of Taylor attention that treat all tiles of all chunks at once; `triton_attention.py` launches them.

Legend: B batch, T sequence, H heads, F feature dim, V value head dim, N chunks, M tokens of a tile, X rows of a block.

`outputs`, `query_gradients` and `key_gradients` take tokens of the own chunk pair by pair, those before through the chunk's
state, those before the segment through the segment's (`triton_sweep.py` makes both). Where a row of the batch is one segment
that nothing enters, no such second state exists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from based_megatron.kernels.taylor_attention.triton_rows import (
    as_columns,
    as_factors,
    features,
    first_factors,
    load_tile,
    load_vector,
    one_hot,
    second_factor,
    second_factors,
    store_tile,
    sum_columns,
)


@triton.jit
def output_gradients(
    do_ptr, o_ptr, inverse_z_ptr, g_ptr, gz_ptr, do_stride_b, do_stride_t, do_stride_h, o_stride_b, o_stride_t, o_stride_h,
    T, H, value_dim: tl.constexpr, value_width: tl.constexpr, tile_tokens: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """Gradients to the numerators, g = do / Z, and to the normaliser, gz = -g.o as columns: [B, H, T, V] and [B, H, T, 4]."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    tokens = tile * tile_tokens + tl.arange(0, tile_tokens)
    columns = tl.arange(0, value_width)
    do_ptr += b * do_stride_b + h * do_stride_h
    o_ptr += b * o_stride_b + h * o_stride_h
    do = load_tile(do_ptr, tokens, do_stride_t, T, columns, value_dim, value_width, even)
    o = load_tile(o_ptr, tokens, o_stride_t, T, columns, value_dim, value_width, even)
    inverse_z = load_vector(inverse_z_ptr + bh64 * T, tokens, T, even)
    g = (do.to(tl.float32) * inverse_z[:, None]).to(g_ptr.dtype.element_ty)
    # The rounded g: an error that both gradients share moves a gradient, but does not break their balance.
    gz = -tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    store_tile(g_ptr + bh64 * T * value_dim, tokens, value_dim, T, columns, value_dim, g)
    gz_columns = as_columns(gz, g_ptr.dtype.element_ty)
    store_tile(gz_ptr + bh64 * T * 4, tokens, 4, T, tl.arange(0, 16), 4, gz_columns)


@triton.jit
def load_block(
    states_ptr, normalisers_ptr, rows_X, limit, columns_V, value_dim: tl.constexpr, value_width: tl.constexpr,
    whole: tl.constexpr,
):  # fmt: skip
    """A block of rows of a stored state: values [X, V], and normalisers as columns [X, 16]; `whole` ignores the limit."""
    values = load_tile(states_ptr, rows_X, value_dim, limit, columns_V, value_dim, value_width, whole)
    return values, load_tile(normalisers_ptr, rows_X, 4, limit, tl.arange(0, 16), 4, 16, whole)


@triton.jit
def start_limit(ids_ptr, edge_token, segment_edge_token, rows_stored: tl.constexpr, has_ids: tl.constexpr):
    """Rows that a chunk reads of its segment's start: none if another document began in between.

    The tokens are those whose documents enter the chunk and the segment. Who reads a chunk's state compares with the
    former; ids do not decrease, so equal ids leave nothing else between.
    """
    if has_ids:
        return tl.where(tl.load(ids_ptr + edge_token) == tl.load(ids_ptr + segment_edge_token), rows_stored, 0)
    return rows_stored


@triton.jit
def output_pairs(
    acc_MV, z_M16, q_MF, k_NF, v_NV, ones_N16, queries, keys, ids_ptr, T, feature_dim: tl.constexpr, has_ids: tl.constexpr,
    diagonal: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of a tile of queries and a tile of keys to the numerators and the normaliser."""
    scale: tl.constexpr = 1.0 / feature_dim**0.5
    s = tl.dot(q_MF, tl.trans(k_NF), input_precision=precision)
    w = s * (s * (0.5 * scale * scale) + scale) + 1.0
    if diagonal:
        w = tl.where(queries[:, None] >= keys[None, :], w, 0.0)
    if has_ids:
        query_ids = load_vector(ids_ptr, queries, T, even)
        w = tl.where(query_ids[:, None] == load_vector(ids_ptr, keys, T, even)[None, :], w, 0.0)
    w = w.to(v_NV.dtype)
    z_M16 = tl.dot(w, ones_N16, z_M16, input_precision=precision)
    return tl.dot(w, v_NV, acc_MV, input_precision=precision), z_M16


@triton.jit
def outputs(
    q_ptr, k_ptr, v_ptr, ids_ptr, states_ptr, normalisers_ptr, starts_ptr, start_normalisers_ptr, o_ptr, inverse_z_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    o_stride_b, o_stride_t, o_stride_h, ids_stride_b, T, H, chunks, segments, segment_chunks,
    feature_dim: tl.constexpr, period: tl.constexpr, width: tl.constexpr, value_dim: tl.constexpr,
    value_width: tl.constexpr, rows_stored: tl.constexpr, block_rows: tl.constexpr, chunk_tokens: tl.constexpr,
    tile_tokens: tl.constexpr, state_stages: tl.constexpr, has_ids: tl.constexpr, has_starts: tl.constexpr, even: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """o and 1/Z of one tile of queries."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    o_ptr += b * o_stride_b + h * o_stride_h
    ids_ptr += b * ids_stride_b
    dtype = q_ptr.dtype.element_ty

    begin = tile * tile_tokens
    chunk = begin // chunk_tokens
    chunk_begin = chunk * chunk_tokens
    queries = begin + tl.arange(0, tile_tokens)
    vector = tl.arange(0, width)
    columns = tl.arange(0, value_width)
    q = load_tile(q_ptr, queries, q_stride_t, T, vector, feature_dim, width, even)
    # Loaded early: a program is short, and would wait for each load in turn.
    own_k = load_tile(k_ptr, queries, k_stride_t, T, vector, feature_dim, width, even)
    own_v = load_tile(v_ptr, queries, v_stride_t, T, columns, value_dim, value_width, even)
    state_index = bh64 * chunks + chunk
    states_ptr += state_index * rows_stored * value_dim
    normalisers_ptr += state_index * rows_stored * 4
    if has_starts:
        segment = chunk // segment_chunks
        starts_ptr += (bh64 * segments + segment) * rows_stored * value_dim
        start_normalisers_ptr += (bh64 * segments + segment) * rows_stored * 4
        segment_begin = segment * segment_chunks * chunk_tokens
        start_rows = start_limit(
            ids_ptr, tl.maximum(chunk_begin - 1, 0), tl.maximum(segment_begin - 1, 0), rows_stored, has_ids
        )

    acc = tl.zeros([tile_tokens, value_width], tl.float32)
    z = tl.zeros([tile_tokens, 16], tl.float32)
    a = first_factors(q, block_rows, period, width, precision)
    # A small state is loaded at once, which is faster; of a larger one, that would fill the registers.
    if rows_stored * value_width <= 192 * 64 and not has_starts:
        blocks = ()
        for block in tl.static_range(rows_stored // block_rows):
            rows = block * block_rows + tl.arange(0, block_rows)
            blocks += (
                load_block(states_ptr, normalisers_ptr, rows, rows_stored, columns, value_dim, value_width, True),
            )
        for block in tl.static_range(rows_stored // block_rows):
            rows = block * block_rows + tl.arange(0, block_rows)
            phi = features(a, second_factors(q, rows, period, width, precision), rows, period).to(dtype)
            z = tl.dot(phi, blocks[block][1], z, input_precision=precision)
            acc = tl.dot(phi, blocks[block][0], acc, input_precision=precision)
    else:
        for row0 in tl.range(0, rows_stored, block_rows, num_stages=state_stages):
            rows = row0 + tl.arange(0, block_rows)
            state, normaliser = load_block(
                states_ptr, normalisers_ptr, rows, rows_stored, columns, value_dim, value_width, True
            )
            phi = features(a, second_factors(q, rows, period, width, precision), rows, period).to(dtype)
            z = tl.dot(phi, normaliser, z, input_precision=precision)
            acc = tl.dot(phi, state, acc, input_precision=precision)
            if has_starts:
                start, start_normaliser = load_block(
                    starts_ptr, start_normalisers_ptr, rows, start_rows, columns, value_dim, value_width, not has_ids
                )
                z = tl.dot(phi, start_normaliser, z, input_precision=precision)
                acc = tl.dot(phi, start, acc, input_precision=precision)
    if has_ids:
        query_ids = load_vector(ids_ptr, queries, T, even)
        reads = tl.where(query_ids == tl.load(ids_ptr + tl.maximum(chunk_begin - 1, 0)), 1.0, 0.0)
        acc *= reads[:, None]
        z *= reads[:, None]

    ones = as_columns(tl.full([tile_tokens], 1.0, tl.float32), dtype)
    for key_begin in tl.range(chunk_begin, begin, tile_tokens):
        keys = key_begin + tl.arange(0, tile_tokens)
        k = load_tile(k_ptr, keys, k_stride_t, T, vector, feature_dim, width, even)
        v = load_tile(v_ptr, keys, v_stride_t, T, columns, value_dim, value_width, even)
        acc, z = output_pairs(
            acc, z, q, k, v, ones, queries, keys, ids_ptr, T, feature_dim, has_ids, False, even, precision
        )
    acc, z = output_pairs(
        acc, z, q, own_k, own_v, ones, queries, queries, ids_ptr, T, feature_dim, has_ids, True, even, precision
    )

    inverse_z = 1.0 / sum_columns(z)
    store_tile(o_ptr, queries, o_stride_t, T, columns, value_dim, acc * inverse_z[:, None])
    tl.store(inverse_z_ptr + bh64 * T + queries, inverse_z, mask=queries < T)


@triton.jit
def to_second_factors(rows_X, period: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr):
    """[X, F] rows that add what flows to second factors up in their entries of x."""
    return tl.trans(one_hot(second_factor(rows_X, period), width, dtype))


@triton.jit
def to_first_factors(block_rows: tl.constexpr, period: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr):
    """The same for first factors, in every block."""
    return tl.trans(one_hot(tl.arange(0, block_rows) % period, width, dtype))


@triton.jit
def query_pairs(
    dq_MF, q_MF, g_MV, gz_M, k_NF, v_NV, queries, keys, ids_ptr, T, feature_dim: tl.constexpr, has_ids: tl.constexpr,
    diagonal: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of a tile of queries and a tile of keys to dq."""
    scale: tl.constexpr = 1.0 / feature_dim**0.5
    s = tl.dot(q_MF, tl.trans(k_NF), input_precision=precision)
    ds = tl.dot(g_MV, tl.trans(v_NV), input_precision=precision) + gz_M[:, None]
    ds *= s * (scale * scale) + scale
    if diagonal:
        ds = tl.where(queries[:, None] >= keys[None, :], ds, 0.0)
    if has_ids:
        query_ids = load_vector(ids_ptr, queries, T, even)
        ds = tl.where(query_ids[:, None] == load_vector(ids_ptr, keys, T, even)[None, :], ds, 0.0)
    return tl.dot(ds.to(k_NF.dtype), k_NF, dq_MF, input_precision=precision)


@triton.jit
def query_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, gz_ptr, ids_ptr, states_ptr, normalisers_ptr, starts_ptr, start_normalisers_ptr, dq_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dq_stride_b, dq_stride_t, dq_stride_h, ids_stride_b, T, H, chunks, segments, segment_chunks,
    feature_dim: tl.constexpr, period: tl.constexpr, width: tl.constexpr, value_dim: tl.constexpr,
    value_width: tl.constexpr, rows_stored: tl.constexpr, block_rows: tl.constexpr, chunk_tokens: tl.constexpr,
    tile_tokens: tl.constexpr, state_stages: tl.constexpr, has_ids: tl.constexpr, has_starts: tl.constexpr, even: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, from the states before the chunks."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    dq_ptr += b * dq_stride_b + h * dq_stride_h
    ids_ptr += b * ids_stride_b
    dtype = q_ptr.dtype.element_ty

    begin = tile * tile_tokens
    chunk = begin // chunk_tokens
    chunk_begin = chunk * chunk_tokens
    queries = begin + tl.arange(0, tile_tokens)
    vector = tl.arange(0, width)
    columns = tl.arange(0, value_width)
    q = load_tile(q_ptr, queries, q_stride_t, T, vector, feature_dim, width, even)
    g = load_tile(g_ptr + bh64 * T * value_dim, queries, value_dim, T, columns, value_dim, value_width, even)
    gz_columns = load_tile(gz_ptr + bh64 * T * 4, queries, 4, T, tl.arange(0, 16), 4, 16, even)
    gz = sum_columns(gz_columns.to(tl.float32))
    state_index = bh64 * chunks + chunk
    states_ptr += state_index * rows_stored * value_dim
    normalisers_ptr += state_index * rows_stored * 4
    if has_starts:
        segment = chunk // segment_chunks
        starts_ptr += (bh64 * segments + segment) * rows_stored * value_dim
        start_normalisers_ptr += (bh64 * segments + segment) * rows_stored * 4
        segment_begin = segment * segment_chunks * chunk_tokens
        start_rows = start_limit(
            ids_ptr, tl.maximum(chunk_begin - 1, 0), tl.maximum(segment_begin - 1, 0), rows_stored, has_ids
        )

    dq = tl.zeros([tile_tokens, width], tl.float32)
    da = tl.zeros([tile_tokens, block_rows], tl.float32)
    gz_factors = as_factors(gz, dtype)
    a = first_factors(q, block_rows, period, width, precision)
    for row0 in tl.range(0, rows_stored, block_rows, num_stages=state_stages):
        rows = row0 + tl.arange(0, block_rows)
        state, normaliser = load_block(
            states_ptr, normalisers_ptr, rows, rows_stored, columns, value_dim, value_width, True
        )
        dphi = tl.dot(gz_factors, tl.trans(normaliser), input_precision=precision)
        dphi = tl.dot(g, tl.trans(state), dphi, input_precision=precision)
        if has_starts:
            start, start_normaliser = load_block(
                starts_ptr, start_normalisers_ptr, rows, start_rows, columns, value_dim, value_width, not has_ids
            )
            dphi = tl.dot(gz_factors, tl.trans(start_normaliser), dphi, input_precision=precision)
            dphi = tl.dot(g, tl.trans(start), dphi, input_precision=precision)
        da += dphi * second_factors(q, rows, period, width, precision)
        dq = tl.dot((dphi * a).to(dtype), to_second_factors(rows, period, width, dtype), dq, input_precision=precision)
    dq = tl.dot(da.to(dtype), to_first_factors(block_rows, period, width, dtype), dq, input_precision=precision)
    if has_ids:
        query_ids = load_vector(ids_ptr, queries, T, even)
        dq *= tl.where(query_ids == tl.load(ids_ptr + tl.maximum(chunk_begin - 1, 0)), 1.0, 0.0)[:, None]

    for key_begin in tl.range(chunk_begin, begin, tile_tokens):
        keys = key_begin + tl.arange(0, tile_tokens)
        k = load_tile(k_ptr, keys, k_stride_t, T, vector, feature_dim, width, even)
        v = load_tile(v_ptr, keys, v_stride_t, T, columns, value_dim, value_width, even)
        dq = query_pairs(dq, q, g, gz, k, v, queries, keys, ids_ptr, T, feature_dim, has_ids, False, even, precision)
    own_k = load_tile(k_ptr, queries, k_stride_t, T, vector, feature_dim, width, even)
    own_v = load_tile(v_ptr, queries, v_stride_t, T, columns, value_dim, value_width, even)
    dq = query_pairs(
        dq, q, g, gz, own_k, own_v, queries, queries, ids_ptr, T, feature_dim, has_ids, True, even, precision
    )
    store_tile(dq_ptr, queries, dq_stride_t, T, vector, feature_dim, dq)


@triton.jit
def key_pairs(
    dk_NF, dv_NV, k_NF, v_NV, ones_N16, q_MF, g_MV, gz_M16, queries, keys, ids_ptr, T, feature_dim: tl.constexpr,
    has_ids: tl.constexpr, diagonal: tl.constexpr, even: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Adds the pairs of a tile of queries and a tile of keys to dk and dv."""
    scale: tl.constexpr = 1.0 / feature_dim**0.5
    s = tl.dot(k_NF, tl.trans(q_MF), input_precision=precision)
    ds = tl.dot(ones_N16, tl.trans(gz_M16), input_precision=precision)
    ds = tl.dot(v_NV, tl.trans(g_MV), ds, input_precision=precision)
    ds *= s * (scale * scale) + scale
    w = s * (s * (0.5 * scale * scale) + scale) + 1.0
    if diagonal:
        visible = queries[None, :] >= keys[:, None]
        ds = tl.where(visible, ds, 0.0)
        w = tl.where(visible, w, 0.0)
    if has_ids:
        key_ids = load_vector(ids_ptr, keys, T, even)
        visible = key_ids[:, None] == load_vector(ids_ptr, queries, T, even)[None, :]
        ds = tl.where(visible, ds, 0.0)
        w = tl.where(visible, w, 0.0)
    # Queries beyond T: g and gz are zeros there, and so is all that they give.
    dv_NV = tl.dot(w.to(g_MV.dtype), g_MV, dv_NV, input_precision=precision)
    return tl.dot(ds.to(q_MF.dtype), q_MF, dk_NF, input_precision=precision), dv_NV


@triton.jit
def key_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, gz_ptr, ids_ptr, states_ptr, normalisers_ptr, starts_ptr, start_normalisers_ptr,
    dk_ptr, dv_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    dk_stride_b, dk_stride_t, dk_stride_h, dv_stride_b, dv_stride_t, dv_stride_h, ids_stride_b, T, H, chunks, segments, segment_chunks,
    feature_dim: tl.constexpr, period: tl.constexpr, width: tl.constexpr, value_dim: tl.constexpr,
    value_width: tl.constexpr, rows_stored: tl.constexpr, block_rows: tl.constexpr, chunk_tokens: tl.constexpr,
    tile_tokens: tl.constexpr, state_stages: tl.constexpr, has_ids: tl.constexpr, has_starts: tl.constexpr, has_pairs: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, from the adjoint states after the chunks.

    Without pairs (the gradient of the moments alone) there is nothing but the adjoint state that enters the one segment.
    """
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    bh64 = bh.to(tl.int64)
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    dk_ptr += b * dk_stride_b + h * dk_stride_h
    dv_ptr += b * dv_stride_b + h * dv_stride_h
    ids_ptr += b * ids_stride_b
    dtype = k_ptr.dtype.element_ty

    begin = tile * tile_tokens
    chunk = begin // chunk_tokens
    chunk_end = tl.minimum((chunk + 1) * chunk_tokens, T)
    keys = begin + tl.arange(0, tile_tokens)
    vector = tl.arange(0, width)
    columns = tl.arange(0, value_width)
    k = load_tile(k_ptr, keys, k_stride_t, T, vector, feature_dim, width, even)
    v = load_tile(v_ptr, keys, v_stride_t, T, columns, value_dim, value_width, even)
    if has_pairs:
        # Loaded early: a program is short, and would wait for each load in turn.
        q_ptr += b * q_stride_b + h * q_stride_h
        g_ptr += bh64 * T * value_dim
        gz_ptr += bh64 * T * 4
        columns16 = tl.arange(0, 16)
        own_q = load_tile(q_ptr, keys, q_stride_t, T, vector, feature_dim, width, even)
        own_g = load_tile(g_ptr, keys, value_dim, T, columns, value_dim, value_width, even)
        own_gz = load_tile(gz_ptr, keys, 4, T, columns16, 4, 16, even)
        state_index = bh64 * chunks + chunk
        states_ptr += state_index * rows_stored * value_dim
        normalisers_ptr += state_index * rows_stored * 4
    if has_starts:
        segment = chunk // segment_chunks
        starts_ptr += (bh64 * segments + segment) * rows_stored * value_dim
        start_normalisers_ptr += (bh64 * segments + segment) * rows_stored * 4
        segment_end = tl.minimum((segment + 1) * segment_chunks * chunk_tokens, T)
        start_rows = start_limit(ids_ptr, chunk_end - 1, segment_end - 1, rows_stored, has_ids)

    dk = tl.zeros([tile_tokens, width], tl.float32)
    dv = tl.zeros([tile_tokens, value_width], tl.float32)
    da = tl.zeros([tile_tokens, block_rows], tl.float32)
    ones = as_factors(tl.full([tile_tokens], 1.0, tl.float32), dtype)
    a = first_factors(k, block_rows, period, width, precision)
    for row0 in tl.range(0, rows_stored, block_rows, num_stages=state_stages):
        rows = row0 + tl.arange(0, block_rows)
        b_plus = second_factors(k, rows, period, width, precision)
        phi = features(a, b_plus, rows, period).to(dtype)
        dphi = tl.zeros([tile_tokens, block_rows], tl.float32)
        if has_pairs:
            state, normaliser = load_block(
                states_ptr, normalisers_ptr, rows, rows_stored, columns, value_dim, value_width, True
            )
            dv = tl.dot(phi, state, dv, input_precision=precision)
            dphi = tl.dot(ones, tl.trans(normaliser), dphi, input_precision=precision)
            dphi = tl.dot(v, tl.trans(state), dphi, input_precision=precision)
        if has_starts:
            start, start_normaliser = load_block(
                starts_ptr, start_normalisers_ptr, rows, start_rows, columns, value_dim, value_width, not has_ids
            )
            dv = tl.dot(phi, start, dv, input_precision=precision)
            dphi = tl.dot(ones, tl.trans(start_normaliser), dphi, input_precision=precision)
            dphi = tl.dot(v, tl.trans(start), dphi, input_precision=precision)
        da += dphi * b_plus
        dk = tl.dot((dphi * a).to(dtype), to_second_factors(rows, period, width, dtype), dk, input_precision=precision)
    dk = tl.dot(da.to(dtype), to_first_factors(block_rows, period, width, dtype), dk, input_precision=precision)
    if has_ids:
        key_ids = load_vector(ids_ptr, keys, T, even)
        writes = tl.where(key_ids == tl.load(ids_ptr + chunk_end - 1), 1.0, 0.0)
        dk *= writes[:, None]
        dv *= writes[:, None]

    if has_pairs:
        dk, dv = key_pairs(
            dk,
            dv,
            k,
            v,
            ones,
            own_q,
            own_g,
            own_gz,
            keys,
            keys,
            ids_ptr,
            T,
            feature_dim,
            has_ids,
            True,
            even,
            precision,
        )
        for query_begin in tl.range(begin + tile_tokens, chunk_end, tile_tokens):
            queries = query_begin + tl.arange(0, tile_tokens)
            q = load_tile(q_ptr, queries, q_stride_t, T, vector, feature_dim, width, even)
            g = load_tile(g_ptr, queries, value_dim, T, columns, value_dim, value_width, even)
            gz = load_tile(gz_ptr, queries, 4, T, columns16, 4, 16, even)
            dk, dv = key_pairs(
                dk, dv, k, v, ones, q, g, gz, queries, keys, ids_ptr, T, feature_dim, has_ids, False, even, precision
            )

    store_tile(dk_ptr, keys, dk_stride_t, T, vector, feature_dim, dk)
    store_tile(dv_ptr, keys, dv_stride_t, T, columns, value_dim, dv)
