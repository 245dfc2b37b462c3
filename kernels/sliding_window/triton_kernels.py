"""Triton kernels of sliding window attention; `triton_window.py` has their maths and launches them.

Legend: T local queries, S keys (S - T of them before the first query), R keys of a halo, V head dim, VP its power of two, W window_left;
M queries and N keys of a tile. Query i and key j have positions i + (S - T) and j; i sees j where 0 <= position difference <= W.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tile(x, rows, rows_end, x_t, V: tl.constexpr, VP: tl.constexpr):
    """[rows, VP] of one head: zeros outside 0 .. rows_end - 1 and right of V."""
    v = tl.arange(0, VP)
    exists = ((rows >= 0) & (rows < rows_end))[:, None]
    if VP != V:
        exists &= (v < V)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * x_t + v[None, :], mask=exists, other=0)


@triton.jit
def _store_tile(x, values, rows, rows_end, x_t, V: tl.constexpr, VP: tl.constexpr):
    v = tl.arange(0, VP)
    exists = ((rows >= 0) & (rows < rows_end))[:, None]
    if VP != V:
        exists &= (v < V)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * x_t + v[None, :], values.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _load_keys(x, halo, keys, R, S, x_t, halo_t, V: tl.constexpr, VP: tl.constexpr, HAS_HALO: tl.constexpr):
    """[keys, VP] of one head: the first R from the halo, the others from x."""
    tile = _load_tile(x, keys - R, S - R, x_t, V, VP)
    if HAS_HALO:
        tile += _load_tile(halo, keys, R, halo_t, V, VP)
    return tile


@triton.jit
def _store_keys(x, halo, values, keys, R, S, x_t, halo_t, V: tl.constexpr, VP: tl.constexpr, HAS_HALO: tl.constexpr):
    _store_tile(x, values, keys - R, S - R, x_t, V, VP)
    if HAS_HALO:
        _store_tile(halo, values, keys, R, halo_t, V, VP)


@triton.jit
def _visible(query_positions, keys, ids, S, W, HAS_IDS: tl.constexpr):
    """Which of the keys a query sees; the arguments broadcast against each other.

    The own key stays visible even to padding, whose id is -1: a row without keys would have no softmax.
    """
    distance = query_positions - keys
    visible = (distance >= 0) & (distance <= W) & (query_positions < S) & (keys >= 0)
    if HAS_IDS:
        query_ids = tl.load(ids + query_positions, mask=query_positions < S, other=-1)
        key_ids = tl.load(ids + keys, mask=(keys >= 0) & (keys < S), other=-1)
        visible &= ((query_ids == key_ids) & (key_ids >= 0)) | (distance == 0)
    return visible


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    o,
    lse_BHT,
    ids,
    halo_k,
    halo_v,
    T,
    S,
    R,
    H,
    W,
    bits,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    halo_b,
    halo_t,
    halo_h,
    o_b,
    o_t,
    o_h,
    ids_b,
    V: tl.constexpr,
    VP: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """o and lse of M queries of one head."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v, o = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h, o + b * o_b + h * o_h
    halo_k, halo_v = halo_k + b * halo_b + h * halo_h, halo_v + b * halo_b + h * halo_h
    ids += b * ids_b
    queries = tl.program_id(1) * M + tl.arange(0, M)
    positions = queries + (S - T)
    q_MV = _load_tile(q, queries, T, q_t, V, VP)

    # Finite, so that a row with nothing visible in its first tiles subtracts no infinities.
    top_M = tl.full((M,), -1e30, tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    o_MV = tl.zeros((M, VP), tl.float32)
    first_position = tl.program_id(1) * M + S - T
    for first_key in range(tl.maximum(first_position - W, 0), tl.minimum(first_position + M, S), N):
        keys = first_key + tl.arange(0, N)
        k_NV = _load_keys(k, halo_k, keys, R, S, k_t, halo_t, V, VP, HAS_HALO)
        v_NV = _load_keys(v, halo_v, keys, R, S, v_t, halo_t, V, VP, HAS_HALO)
        s_MN = tl.dot(q_MV, k_NV.T, input_precision=PRECISION) * bits
        s_MN = tl.where(_visible(positions[:, None], keys[None, :], ids, S, W, HAS_IDS), s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, 1))
        p_MN = tl.exp2(s_MN - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        o_MV = tl.dot(p_MN.to(v_NV.dtype), v_NV, o_MV * shrink_M[:, None], input_precision=PRECISION)
        top_M = new_top_M

    sum_M = tl.where(queries < T, sum_M, 1.0)
    _store_tile(o, o_MV / sum_M[:, None], queries, T, o_t, V, VP)
    tl.store(lse_BHT + bh * T + queries, top_M + tl.log2(sum_M), mask=queries < T)


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    o,
    do,
    lse_BHT,
    dq,
    delta_BHT,
    ids,
    halo_k,
    halo_v,
    T,
    S,
    R,
    H,
    W,
    scale,
    bits,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    halo_b,
    halo_t,
    halo_h,
    o_b,
    o_t,
    o_h,
    do_b,
    do_t,
    do_h,
    dq_b,
    dq_t,
    dq_h,
    ids_b,
    V: tl.constexpr,
    VP: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dq and delta of M queries of one head."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h
    o, do, dq = o + b * o_b + h * o_h, do + b * do_b + h * do_h, dq + b * dq_b + h * dq_h
    halo_k, halo_v = halo_k + b * halo_b + h * halo_h, halo_v + b * halo_b + h * halo_h
    ids += b * ids_b
    queries = tl.program_id(1) * M + tl.arange(0, M)
    positions = queries + (S - T)
    q_MV = _load_tile(q, queries, T, q_t, V, VP)
    do_MV = _load_tile(do, queries, T, do_t, V, VP)
    o_MV = _load_tile(o, queries, T, o_t, V, VP)
    delta_M = tl.sum(o_MV.to(tl.float32) * do_MV.to(tl.float32), 1)
    tl.store(delta_BHT + bh * T + queries, delta_M, mask=queries < T)
    lse_M = tl.load(lse_BHT + bh * T + queries, mask=queries < T, other=0)

    dq_MV = tl.zeros((M, VP), tl.float32)
    first_position = tl.program_id(1) * M + S - T
    for first_key in range(tl.maximum(first_position - W, 0), tl.minimum(first_position + M, S), N):
        keys = first_key + tl.arange(0, N)
        k_NV = _load_keys(k, halo_k, keys, R, S, k_t, halo_t, V, VP, HAS_HALO)
        v_NV = _load_keys(v, halo_v, keys, R, S, v_t, halo_t, V, VP, HAS_HALO)
        s_MN = tl.dot(q_MV, k_NV.T, input_precision=PRECISION) * bits
        dp_MN = tl.dot(do_MV, v_NV.T, input_precision=PRECISION)
        s_MN = tl.where(_visible(positions[:, None], keys[None, :], ids, S, W, HAS_IDS), s_MN, float("-inf"))
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MV = tl.dot(ds_MN.to(k_NV.dtype), k_NV, dq_MV, input_precision=PRECISION)
    _store_tile(dq, dq_MV * scale, queries, T, dq_t, V, VP)


@triton.jit
def dkdv_kernel(
    q,
    k,
    v,
    do,
    lse_BHT,
    delta_BHT,
    dk,
    dv,
    dhalo_k,
    dhalo_v,
    ids,
    halo_k,
    halo_v,
    T,
    S,
    R,
    H,
    W,
    scale,
    bits,
    first_tile,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    halo_b,
    halo_t,
    halo_h,
    do_b,
    do_t,
    do_h,
    dk_b,
    dk_t,
    dk_h,
    dv_b,
    dv_t,
    dv_h,
    dhalo_b,
    dhalo_t,
    dhalo_h,
    ids_b,
    V: tl.constexpr,
    VP: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dk and dv of N keys of one head: zeros for halo keys that no query sees."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h
    do, dk, dv = do + b * do_b + h * do_h, dk + b * dk_b + h * dk_h, dv + b * dv_b + h * dv_h
    lse_BHT += bh * T
    delta_BHT += bh * T
    halo_k, halo_v = halo_k + b * halo_b + h * halo_h, halo_v + b * halo_b + h * halo_h
    dhalo_k, dhalo_v = dhalo_k + b * dhalo_b + h * dhalo_h, dhalo_v + b * dhalo_b + h * dhalo_h
    ids += b * ids_b
    first_key = (first_tile + tl.program_id(1)) * N
    keys = first_key + tl.arange(0, N)
    k_NV = _load_keys(k, halo_k, keys, R, S, k_t, halo_t, V, VP, HAS_HALO)
    v_NV = _load_keys(v, halo_v, keys, R, S, v_t, halo_t, V, VP, HAS_HALO)

    dk_NV = tl.zeros((N, VP), tl.float32)
    dv_NV = tl.zeros((N, VP), tl.float32)
    own_query = first_key - (S - T)
    for first_query in range(tl.maximum(own_query, 0), tl.minimum(own_query + N + W, T), M):
        queries = first_query + tl.arange(0, M)
        q_MV = _load_tile(q, queries, T, q_t, V, VP)
        do_MV = _load_tile(do, queries, T, do_t, V, VP)
        lse_M = tl.load(lse_BHT + queries, mask=queries < T, other=0)
        delta_M = tl.load(delta_BHT + queries, mask=queries < T, other=0)
        s_NM = tl.dot(k_NV, q_MV.T, input_precision=PRECISION) * bits
        dp_NM = tl.dot(v_NV, do_MV.T, input_precision=PRECISION)
        visible_NM = _visible((queries + (S - T))[None, :], keys[:, None], ids, S, W, HAS_IDS)
        p_NM = tl.exp2(tl.where(visible_NM, s_NM, float("-inf")) - lse_M[None, :])
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dv_NV = tl.dot(p_NM.to(do_MV.dtype), do_MV, dv_NV, input_precision=PRECISION)
        dk_NV = tl.dot(ds_NM.to(q_MV.dtype), q_MV, dk_NV, input_precision=PRECISION)
    _store_keys(dk, dhalo_k, dk_NV * scale, keys, R, S, dk_t, dhalo_t, V, VP, HAS_HALO)
    _store_keys(dv, dhalo_v, dv_NV, keys, R, S, dv_t, dhalo_t, V, VP, HAS_HALO)
