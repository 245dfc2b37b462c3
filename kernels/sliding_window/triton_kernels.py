"""Triton kernels of sliding window attention; `triton_window.py` has their maths and launches them.

Legend: T queries, S keys (S - T of them before the first query), N keys of a halo, H heads, V head dim, W window_left;
I queries and J keys of a tile. Query i and key j have positions i + (S - T) and j; i sees j where 0 <= position difference <= W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from based_megatron.kernels.triton_operand import head_ptr


@triton.jit
def _load_tile(x_ptr, rows, rows_end, stride_t, V: tl.constexpr, PADDED_V: tl.constexpr):
    """[rows, PADDED_V] of one head: zeros outside 0 .. rows_end - 1 and right of V."""
    v = tl.arange(0, PADDED_V)
    inside = ((rows >= 0) & (rows < rows_end))[:, None]
    if PADDED_V != V:
        inside &= (v < V)[None, :]
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_t + v[None, :], mask=inside, other=0)


@triton.jit
def _store_tile(x_ptr, values, rows, rows_end, stride_t, V: tl.constexpr, PADDED_V: tl.constexpr):
    """Stores the part of [rows, PADDED_V] that is inside of one head."""
    v = tl.arange(0, PADDED_V)
    inside = ((rows >= 0) & (rows < rows_end))[:, None]
    if PADDED_V != V:
        inside &= (v < V)[None, :]
    tl.store(x_ptr + rows.to(tl.int64)[:, None] * stride_t + v[None, :], values.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_keys(
    x_ptr,
    halo_ptr,
    keys,
    N,
    S,
    stride_t,
    halo_stride_t,
    V: tl.constexpr,
    PADDED_V: tl.constexpr,
    HAS_HALO: tl.constexpr,
):
    """[keys, PADDED_V] of one head: the first N from the halo, the others from x."""
    tile = _load_tile(x_ptr, keys - N, S - N, stride_t, V, PADDED_V)
    if HAS_HALO:
        tile += _load_tile(halo_ptr, keys, N, halo_stride_t, V, PADDED_V)
    return tile


@triton.jit
def _store_keys(
    x_ptr, halo_ptr, values, keys, N, S, stride_t, halo_stride_t, V: tl.constexpr, PADDED_V: tl.constexpr,
    HAS_HALO: tl.constexpr,
):  # fmt: skip
    """The reverse of `_load_keys`."""
    _store_tile(x_ptr, values, keys - N, S - N, stride_t, V, PADDED_V)
    if HAS_HALO:
        _store_tile(halo_ptr, values, keys, N, halo_stride_t, V, PADDED_V)


@triton.jit
def _visible(query_positions, keys, ids_ptr, S, W, HAS_IDS: tl.constexpr):
    """Mask of the keys that a query sees; the arguments broadcast against each other.

    The own key stays visible even to padding, whose id is -1: a row without keys would have no softmax.
    """
    distance = query_positions - keys
    visible = (distance >= 0) & (distance <= W) & (query_positions < S) & (keys >= 0)
    if HAS_IDS:
        query_ids = tl.load(ids_ptr + query_positions, mask=query_positions < S, other=-1)
        key_ids = tl.load(ids_ptr + keys, mask=(keys >= 0) & (keys < S), other=-1)
        visible &= ((query_ids == key_ids) & (key_ids >= 0)) | (distance == 0)
    return visible


@triton.jit
def forward_kernel(
    q, k, v, o, lse_ptr, ids, halo, halo_v_ptr, T, S, N, H, W, scale_bits,
    V: tl.constexpr, PADDED_V: tl.constexpr, HAS_HALO: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """One program: o and lse of a tile of queries of one head. The halo has keys and values with the same strides."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr, k_ptr, v_ptr, o_ptr = head_ptr(q, b, h), head_ptr(k, b, h), head_ptr(v, b, h), head_ptr(o, b, h)
    halo_k_ptr, halo_v_ptr = head_ptr(halo, b, h), halo_v_ptr + b * halo.stride_b + h * halo.stride_h
    ids_ptr = ids.ptr + b * ids.stride_b
    queries = tl.program_id(1) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    positions = queries + (S - T)
    q_IV = _load_tile(q_ptr, queries, T, q.stride_t, V, PADDED_V)

    # Finite, so that a row with nothing visible in its first tiles subtracts no infinities.
    top_I = tl.full((TILE_QUERIES,), -1e30, tl.float32)
    sum_I = tl.zeros((TILE_QUERIES,), tl.float32)
    o_IV = tl.zeros((TILE_QUERIES, PADDED_V), tl.float32)
    first_position = tl.program_id(1) * TILE_QUERIES + S - T
    for first_key in range(tl.maximum(first_position - W, 0), tl.minimum(first_position + TILE_QUERIES, S), TILE_KEYS):
        keys = first_key + tl.arange(0, TILE_KEYS)
        k_JV = _load_keys(k_ptr, halo_k_ptr, keys, N, S, k.stride_t, halo.stride_t, V, PADDED_V, HAS_HALO)
        v_JV = _load_keys(v_ptr, halo_v_ptr, keys, N, S, v.stride_t, halo.stride_t, V, PADDED_V, HAS_HALO)
        s_IJ = tl.dot(q_IV, k_JV.T, input_precision=PRECISION) * scale_bits
        s_IJ = tl.where(_visible(positions[:, None], keys[None, :], ids_ptr, S, W, HAS_IDS), s_IJ, float("-inf"))
        new_top_I = tl.maximum(top_I, tl.max(s_IJ, 1))
        p_IJ = tl.exp2(s_IJ - new_top_I[:, None])
        shrink_I = tl.exp2(top_I - new_top_I)
        sum_I = sum_I * shrink_I + tl.sum(p_IJ, 1)
        o_IV = tl.dot(p_IJ.to(v_JV.dtype), v_JV, o_IV * shrink_I[:, None], input_precision=PRECISION)
        top_I = new_top_I

    sum_I = tl.where(queries < T, sum_I, 1.0)
    _store_tile(o_ptr, o_IV / sum_I[:, None], queries, T, o.stride_t, V, PADDED_V)
    tl.store(lse_ptr + bh * T + queries, top_I + tl.log2(sum_I), mask=queries < T)


@triton.jit
def dq_kernel(
    q, k, v, o, do, lse_ptr, dq, delta_ptr, ids, halo, halo_v_ptr, T, S, N, H, W, scale, scale_bits,
    V: tl.constexpr, PADDED_V: tl.constexpr, HAS_HALO: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """One program: dq and delta of a tile of queries of one head."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr, k_ptr, v_ptr = head_ptr(q, b, h), head_ptr(k, b, h), head_ptr(v, b, h)
    o_ptr, do_ptr, dq_ptr = head_ptr(o, b, h), head_ptr(do, b, h), head_ptr(dq, b, h)
    halo_k_ptr, halo_v_ptr = head_ptr(halo, b, h), halo_v_ptr + b * halo.stride_b + h * halo.stride_h
    ids_ptr = ids.ptr + b * ids.stride_b
    queries = tl.program_id(1) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    positions = queries + (S - T)
    q_IV = _load_tile(q_ptr, queries, T, q.stride_t, V, PADDED_V)
    do_IV = _load_tile(do_ptr, queries, T, do.stride_t, V, PADDED_V)
    o_IV = _load_tile(o_ptr, queries, T, o.stride_t, V, PADDED_V)
    delta_I = tl.sum(o_IV.to(tl.float32) * do_IV.to(tl.float32), 1)
    tl.store(delta_ptr + bh * T + queries, delta_I, mask=queries < T)
    lse_I = tl.load(lse_ptr + bh * T + queries, mask=queries < T, other=0)

    dq_IV = tl.zeros((TILE_QUERIES, PADDED_V), tl.float32)
    first_position = tl.program_id(1) * TILE_QUERIES + S - T
    for first_key in range(tl.maximum(first_position - W, 0), tl.minimum(first_position + TILE_QUERIES, S), TILE_KEYS):
        keys = first_key + tl.arange(0, TILE_KEYS)
        k_JV = _load_keys(k_ptr, halo_k_ptr, keys, N, S, k.stride_t, halo.stride_t, V, PADDED_V, HAS_HALO)
        v_JV = _load_keys(v_ptr, halo_v_ptr, keys, N, S, v.stride_t, halo.stride_t, V, PADDED_V, HAS_HALO)
        s_IJ = tl.dot(q_IV, k_JV.T, input_precision=PRECISION) * scale_bits
        dp_IJ = tl.dot(do_IV, v_JV.T, input_precision=PRECISION)
        s_IJ = tl.where(_visible(positions[:, None], keys[None, :], ids_ptr, S, W, HAS_IDS), s_IJ, float("-inf"))
        p_IJ = tl.exp2(s_IJ - lse_I[:, None])
        ds_IJ = p_IJ * (dp_IJ - delta_I[:, None])
        dq_IV = tl.dot(ds_IJ.to(k_JV.dtype), k_JV, dq_IV, input_precision=PRECISION)
    _store_tile(dq_ptr, dq_IV * scale, queries, T, dq.stride_t, V, PADDED_V)


@triton.jit
def dkdv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, dhalo, dhalo_v_ptr, ids, halo, halo_v_ptr, T, S, N, H, W, scale, scale_bits, first_tile,
    V: tl.constexpr, PADDED_V: tl.constexpr, HAS_HALO: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_QUERIES: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of a tile of keys of one head; zeros for halo keys that no query sees."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr, k_ptr, v_ptr = head_ptr(q, b, h), head_ptr(k, b, h), head_ptr(v, b, h)
    do_ptr, dk_ptr, dv_ptr = head_ptr(do, b, h), head_ptr(dk, b, h), head_ptr(dv, b, h)
    lse_ptr += bh * T
    delta_ptr += bh * T
    halo_k_ptr, halo_v_ptr = head_ptr(halo, b, h), halo_v_ptr + b * halo.stride_b + h * halo.stride_h
    dhalo_k_ptr, dhalo_v_ptr = head_ptr(dhalo, b, h), dhalo_v_ptr + b * dhalo.stride_b + h * dhalo.stride_h
    ids_ptr = ids.ptr + b * ids.stride_b
    first_key = (first_tile + tl.program_id(1)) * TILE_KEYS
    keys = first_key + tl.arange(0, TILE_KEYS)
    k_JV = _load_keys(k_ptr, halo_k_ptr, keys, N, S, k.stride_t, halo.stride_t, V, PADDED_V, HAS_HALO)
    v_JV = _load_keys(v_ptr, halo_v_ptr, keys, N, S, v.stride_t, halo.stride_t, V, PADDED_V, HAS_HALO)

    dk_JV = tl.zeros((TILE_KEYS, PADDED_V), tl.float32)
    dv_JV = tl.zeros((TILE_KEYS, PADDED_V), tl.float32)
    own_query = first_key - (S - T)
    for first_query in range(tl.maximum(own_query, 0), tl.minimum(own_query + TILE_KEYS + W, T), TILE_QUERIES):
        queries = first_query + tl.arange(0, TILE_QUERIES)
        q_IV = _load_tile(q_ptr, queries, T, q.stride_t, V, PADDED_V)
        do_IV = _load_tile(do_ptr, queries, T, do.stride_t, V, PADDED_V)
        lse_I = tl.load(lse_ptr + queries, mask=queries < T, other=0)
        delta_I = tl.load(delta_ptr + queries, mask=queries < T, other=0)
        s_JI = tl.dot(k_JV, q_IV.T, input_precision=PRECISION) * scale_bits
        dp_JI = tl.dot(v_JV, do_IV.T, input_precision=PRECISION)
        visible_JI = _visible((queries + (S - T))[None, :], keys[:, None], ids_ptr, S, W, HAS_IDS)
        p_JI = tl.exp2(tl.where(visible_JI, s_JI, float("-inf")) - lse_I[None, :])
        ds_JI = p_JI * (dp_JI - delta_I[None, :])
        dv_JV = tl.dot(p_JI.to(do_IV.dtype), do_IV, dv_JV, input_precision=PRECISION)
        dk_JV = tl.dot(ds_JI.to(q_IV.dtype), q_IV, dk_JV, input_precision=PRECISION)
    _store_keys(dk_ptr, dhalo_k_ptr, dk_JV * scale, keys, N, S, dk.stride_t, dhalo.stride_t, V, PADDED_V, HAS_HALO)
    _store_keys(dv_ptr, dhalo_v_ptr, dv_JV, keys, N, S, dv.stride_t, dhalo.stride_t, V, PADDED_V, HAS_HALO)
