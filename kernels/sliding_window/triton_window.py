"""Sliding window attention in Triton, flash style: scores never reach device memory.

Legend: B batch, T local queries, S keys (S - T of them before the first query), H heads, V head dim, W window_left; M queries
and N keys of a tile. Query i and key j have positions i + (S - T) and j; i sees j where 0 <= position difference <= W.

    s_ij = q_i.k_j / sqrt(V),  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i.v_j - delta_i),  delta_i = do_i.o_i
    dq_i = sum_j ds_ij k_j / sqrt(V),  dk_j = sum_i ds_ij q_i / sqrt(V)

Forward and dq walk over the key tiles that a query tile sees; dk and dv over the query tiles that see a key tile. No atomics:
the same bits in every run. Exponents are in base 2, so `lse` is in bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.layout import ids_or, laid_out_like, strides, unit_last_stride

BITS = 1.4426950408889634
"""log2(e)."""


class Tile(NamedTuple):
    """Work of one program, and how the compiler schedules it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkdv: Tile


def default_tiles(padded_head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles that fill the tensor cores and keep accumulators in registers; fp32 products run beside the tensor cores."""
    if dtype == torch.float32:
        tile = Tile(32, 32, 8, 1)
        return Tiles(tile, tile, tile)
    # The fastest of those measured on an H200 at head dims 64 and 112.
    if padded_head_dim <= 64:
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
    return Tiles(Tile(64, 64, 4, 1), Tile(64, 32, 4, 2), Tile(32, 64, 4, 1))


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
    exists = (rows < rows_end)[:, None]
    if VP != V:
        exists &= (v < V)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * x_t + v[None, :], values.to(x.dtype.element_ty), mask=exists)


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
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse_BHT,
    ids,
    T,
    S,
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
    o_b,
    o_t,
    o_h,
    ids_b,
    V: tl.constexpr,
    VP: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """o and lse of M queries of one head."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v, o = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h, o + b * o_b + h * o_h
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
        k_NV = _load_tile(k, keys, S, k_t, V, VP)
        v_NV = _load_tile(v, keys, S, v_t, V, VP)
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
def _dq_kernel(
    q,
    k,
    v,
    o,
    do,
    lse_BHT,
    dq,
    delta_BHT,
    ids,
    T,
    S,
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
        k_NV = _load_tile(k, keys, S, k_t, V, VP)
        v_NV = _load_tile(v, keys, S, v_t, V, VP)
        s_MN = tl.dot(q_MV, k_NV.T, input_precision=PRECISION) * bits
        dp_MN = tl.dot(do_MV, v_NV.T, input_precision=PRECISION)
        s_MN = tl.where(_visible(positions[:, None], keys[None, :], ids, S, W, HAS_IDS), s_MN, float("-inf"))
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MV = tl.dot(ds_MN.to(k_NV.dtype), k_NV, dq_MV, input_precision=PRECISION)
    _store_tile(dq, dq_MV * scale, queries, T, dq_t, V, VP)


@triton.jit
def _dkdv_kernel(
    q,
    k,
    v,
    do,
    lse_BHT,
    delta_BHT,
    dk,
    dv,
    ids,
    T,
    S,
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
    do_b,
    do_t,
    do_h,
    dk_b,
    dk_t,
    dk_h,
    dv_b,
    dv_t,
    dv_h,
    ids_b,
    V: tl.constexpr,
    VP: tl.constexpr,
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
    ids += b * ids_b
    first_key = tl.program_id(1) * N
    keys = first_key + tl.arange(0, N)
    k_NV = _load_tile(k, keys, S, k_t, V, VP)
    v_NV = _load_tile(v, keys, S, v_t, V, VP)

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
    _store_tile(dk, dk_NV * scale, keys, S, dk_t, V, VP)
    _store_tile(dv, dv_NV, keys, S, dv_t, V, VP)


class SlidingWindowAttention(torch.autograd.Function):
    """(q, k, v, window_left, ids of the keys) to o."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, window_left: int, ids_BS: Tensor | None
    ) -> Tensor:
        q_BTHV, k_BSHV, v_BSHV = (unit_last_stride(x) for x in (q_BTHV, k_BSHV, v_BSHV))
        o_BTHV, lse_BHT = attention_forward(q_BTHV, k_BSHV, v_BSHV, window_left, ids_BS)
        ctx.save_for_backward(q_BTHV, k_BSHV, v_BSHV, o_BTHV, lse_BHT, ids_BS)
        ctx.window_left = window_left
        return o_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        *saved, ids_BS = ctx.saved_tensors
        return *attention_backward(*saved, unit_last_stride(do_BTHV), ctx.window_left, ids_BS), None, None


def attention_forward(
    q_BTHV: Tensor,
    k_BSHV: Tensor,
    v_BSHV: Tensor,
    window_left: int,
    ids_BS: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(o_BTHV, laid out like q, and lse_BHT, fp32 in bits); last strides are 1."""
    B, T, H, V = q_BTHV.shape
    S = k_BSHV.shape[1]
    shape = _shape_of_kernel(q_BTHV, ids_BS)
    tile = tile or default_tiles(shape["VP"], q_BTHV.dtype).forward
    o_BTHV = laid_out_like(q_BTHV)
    lse_BHT = torch.empty(B, H, T, dtype=torch.float32, device=q_BTHV.device)
    ids, ids_b = ids_or(q_BTHV, ids_BS)
    _forward_kernel[(B * H, triton.cdiv(T, tile.queries))](
        q_BTHV,
        k_BSHV,
        v_BSHV,
        o_BTHV,
        lse_BHT,
        ids,
        T,
        S,
        H,
        min(window_left, S),
        V**-0.5 * BITS,
        *strides(q_BTHV, k_BSHV, v_BSHV, o_BTHV),
        ids_b,
        **shape,
        M=tile.queries,
        N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return o_BTHV, lse_BHT


def attention_backward(
    q_BTHV: Tensor,
    k_BSHV: Tensor,
    v_BSHV: Tensor,
    o_BTHV: Tensor,
    lse_BHT: Tensor,
    do_BTHV: Tensor,
    window_left: int,
    ids_BS: Tensor | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_BTHV, dk_BSHV, dv_BSHV), laid out like q, k and v, from what `attention_forward` returned; last strides are 1."""
    B, T, H, V = q_BTHV.shape
    S = k_BSHV.shape[1]
    shape = _shape_of_kernel(q_BTHV, ids_BS)
    _, dq_tile, dkdv_tile = tiles or default_tiles(shape["VP"], q_BTHV.dtype)
    dq_BTHV, dk_BSHV, dv_BSHV = (laid_out_like(x) for x in (q_BTHV, k_BSHV, v_BSHV))
    delta_BHT = torch.empty_like(lse_BHT)
    ids, ids_b = ids_or(q_BTHV, ids_BS)
    sizes = (T, S, H, min(window_left, S), V**-0.5, V**-0.5 * BITS)
    # First dq, which leaves delta for dk.
    _dq_kernel[(B * H, triton.cdiv(T, dq_tile.queries))](
        q_BTHV,
        k_BSHV,
        v_BSHV,
        o_BTHV,
        do_BTHV,
        lse_BHT,
        dq_BTHV,
        delta_BHT,
        ids,
        *sizes,
        *strides(q_BTHV, k_BSHV, v_BSHV, o_BTHV, do_BTHV, dq_BTHV),
        ids_b,
        **shape,
        M=dq_tile.queries,
        N=dq_tile.keys,
        num_warps=dq_tile.warps,
        num_stages=dq_tile.stages,
    )
    _dkdv_kernel[(B * H, triton.cdiv(S, dkdv_tile.keys))](
        q_BTHV,
        k_BSHV,
        v_BSHV,
        do_BTHV,
        lse_BHT,
        delta_BHT,
        dk_BSHV,
        dv_BSHV,
        ids,
        *sizes,
        *strides(q_BTHV, k_BSHV, v_BSHV, do_BTHV, dk_BSHV, dv_BSHV),
        ids_b,
        **shape,
        M=dkdv_tile.queries,
        N=dkdv_tile.keys,
        num_warps=dkdv_tile.warps,
        num_stages=dkdv_tile.stages,
    )
    return dq_BTHV, dk_BSHV, dv_BSHV


def sliding_window_attention(
    q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, window_left: int, key_document_ids_BS: Tensor | None
) -> Tensor:
    """Attention to the last window_left keys and the own one; see the package's function of the same name."""
    return SlidingWindowAttention.apply(q_BTHV, k_BSHV, v_BSHV, window_left, key_document_ids_BS)


def _shape_of_kernel(q_BTHV: Tensor, ids_BS: Tensor | None) -> dict[str, Any]:
    """Compile-time constants of all kernels. Tensor cores want head dims of a power of two, 16 at least."""
    V = q_BTHV.shape[-1]
    return {
        "V": V,
        "VP": max(16, triton.next_power_of_2(V)),
        "HAS_IDS": ids_BS is not None,
        "PRECISION": "ieee" if q_BTHV.dtype == torch.float32 else "tf32",  # bf16 products are the same in either
    }
