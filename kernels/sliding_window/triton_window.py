"""Sliding window attention in Triton, flash style: scores never reach device memory.

Legend: B batch, T local queries, S keys (S - T of them before the first query), H heads, V head dim, W window_left; M queries
and N keys of a tile. Query i and key j have positions i + (S - T) and j; i sees j where 0 <= position difference <= W.
The first R keys may lie apart from the others, in a halo that came from another rank: nothing is copied to join them.

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

from based_megatron.kernels.exchange import Halo, HaloReturn
from based_megatron.kernels.layout import ids_or, laid_out_like, strides, unit_last_stride

BITS = 1.4426950408889634
"""log2(e)."""


class Tile(NamedTuple):
    """Work of one program, and how the compiler schedules it."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As the kernels take them."""
        return {"M": self.queries, "N": self.keys, "num_warps": self.warps, "num_stages": self.stages}


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
def _forward_kernel(
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
def _dkdv_kernel(
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


class SlidingWindowAttention(torch.autograd.Function):
    """(q, k, v, window_left, ids of the keys, halo or None) to o."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHV: Tensor,
        k_BTHV: Tensor,
        v_BTHV: Tensor,
        window_left: int,
        ids_BS: Tensor | None,
        halo: Halo | None,
    ) -> Tensor:
        q_BTHV, k_BTHV, v_BTHV = (unit_last_stride(x) for x in (q_BTHV, k_BTHV, v_BTHV))
        halo_BR2HV = None if halo is None else halo.arriving.wait()
        o_BTHV, lse_BHT = attention_forward(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo_BR2HV)
        ctx.save_for_backward(q_BTHV, k_BTHV, v_BTHV, o_BTHV, lse_BHT, ids_BS, halo_BR2HV)
        ctx.window_left, ctx.back = window_left, None if halo is None else halo.back
        return o_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        *saved, ids_BS, halo_BR2HV = ctx.saved_tensors
        gradients = attention_backward(*saved, unit_last_stride(do_BTHV), ctx.window_left, ids_BS, halo_BR2HV, ctx.back)
        return *gradients, None, None, None


def attention_forward(
    q_BTHV: Tensor,
    k_BTHV: Tensor,
    v_BTHV: Tensor,
    window_left: int,
    ids_BS: Tensor | None,
    halo_BR2HV: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(o_BTHV, laid out like q, and lse_BHT, fp32 in bits); last strides are 1. A halo has keys and values of R earlier tokens."""
    call = _Call(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo_BR2HV)
    tile = tile or default_tiles(call.shape["VP"], q_BTHV.dtype).forward
    o_BTHV = laid_out_like(q_BTHV)
    lse_BHT = torch.empty(call.B, call.H, call.T, dtype=torch.float32, device=q_BTHV.device)
    _forward_kernel[call.grid(call.T, tile.queries)](
        q_BTHV,
        k_BTHV,
        v_BTHV,
        o_BTHV,
        lse_BHT,
        call.ids,
        *call.halo,
        *call.sizes,
        call.scale * BITS,
        *strides(q_BTHV, k_BTHV, v_BTHV, call.halo[0], o_BTHV),
        call.ids_b,
        **call.shape,
        **tile.options(),
    )
    return o_BTHV, lse_BHT


def attention_backward(
    q_BTHV: Tensor,
    k_BTHV: Tensor,
    v_BTHV: Tensor,
    o_BTHV: Tensor,
    lse_BHT: Tensor,
    do_BTHV: Tensor,
    window_left: int,
    ids_BS: Tensor | None,
    halo_BR2HV: Tensor | None = None,
    back: HaloReturn | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_BTHV, dk_BTHV, dv_BTHV), laid out like q, k and v, from what `attention_forward` returned; last strides are 1.

    With `back`, the gradient of the halo goes home while that of the other keys is computed, and what comes is in dk and dv.
    """
    call = _Call(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo_BR2HV)
    _, dq_tile, dkdv_tile = tiles or default_tiles(call.shape["VP"], q_BTHV.dtype)
    dq_BTHV, dk_BTHV, dv_BTHV = (laid_out_like(x) for x in (q_BTHV, k_BTHV, v_BTHV))
    delta_BHT = torch.empty_like(lse_BHT)
    sizes = (*call.sizes, call.scale, call.scale * BITS)
    # First dq, which leaves delta for dk.
    _dq_kernel[call.grid(call.T, dq_tile.queries)](
        q_BTHV,
        k_BTHV,
        v_BTHV,
        o_BTHV,
        do_BTHV,
        lse_BHT,
        dq_BTHV,
        delta_BHT,
        call.ids,
        *call.halo,
        *sizes,
        *strides(q_BTHV, k_BTHV, v_BTHV, call.halo[0], o_BTHV, do_BTHV, dq_BTHV),
        call.ids_b,
        **call.shape,
        **dq_tile.options(),
    )
    dhalo_BR2HV = q_BTHV.new_empty(call.B, call.R, 2, *q_BTHV.shape[2:])
    dhalo = _keys_and_values(dhalo_BR2HV) if call.R else (dk_BTHV, dv_BTHV)

    def keys_and_values(first_tile: int, tile_count: int) -> None:
        if not tile_count:
            return
        _dkdv_kernel[call.B * call.H, tile_count](
            q_BTHV,
            k_BTHV,
            v_BTHV,
            do_BTHV,
            lse_BHT,
            delta_BHT,
            dk_BTHV,
            dv_BTHV,
            *dhalo,
            call.ids,
            *call.halo,
            *sizes,
            first_tile,
            *strides(q_BTHV, k_BTHV, v_BTHV, call.halo[0], do_BTHV, dk_BTHV, dv_BTHV, dhalo[0]),
            call.ids_b,
            **call.shape,
            **dkdv_tile.options(),
        )

    halo_tiles = triton.cdiv(call.R, dkdv_tile.keys)
    keys_and_values(0, halo_tiles)
    returning = None if back is None else back.start_return(dhalo_BR2HV)
    keys_and_values(halo_tiles, triton.cdiv(call.S, dkdv_tile.keys) - halo_tiles)
    if returning is not None:
        late_Bt2HV = returning.wait()
        rows = slice(call.T - late_Bt2HV.shape[1], None)
        for gradient, late in zip((dk_BTHV, dv_BTHV), _keys_and_values(late_Bt2HV), strict=True):
            gradient[:, rows] += late
    return dq_BTHV, dk_BTHV, dv_BTHV


def sliding_window_attention(
    q_BTHV: Tensor,
    k_BTHV: Tensor,
    v_BTHV: Tensor,
    window_left: int,
    key_document_ids_BS: Tensor | None,
    halo: Halo | None = None,
) -> Tensor:
    """Attention to the last window_left keys and the own one; see the package's functions."""
    return SlidingWindowAttention.apply(q_BTHV, k_BTHV, v_BTHV, window_left, key_document_ids_BS, halo)


def _keys_and_values(x_BR2HV: Tensor) -> tuple[Tensor, Tensor]:
    return x_BR2HV[:, :, 0], x_BR2HV[:, :, 1]


class _Call:
    """What the kernels of one call have in common."""

    def __init__(
        self,
        q_BTHV: Tensor,
        k_BTHV: Tensor,
        v_BTHV: Tensor,
        window_left: int,
        ids_BS: Tensor | None,
        halo: Tensor | None,
    ) -> None:
        self.B, self.T, self.H, V = q_BTHV.shape
        self.R = 0 if halo is None else halo.shape[1]
        self.S = self.R + k_BTHV.shape[1]
        self.halo = (k_BTHV, v_BTHV) if halo is None or not self.R else _keys_and_values(halo)
        self.sizes = (self.T, self.S, self.R, self.H, min(window_left, self.S))
        self.scale = V**-0.5
        self.ids, self.ids_b = ids_or(q_BTHV, ids_BS)
        # Tensor cores want head dims of a power of two, 16 at least.
        self.shape = {
            "V": V,
            "VP": max(16, triton.next_power_of_2(V)),
            "HAS_HALO": self.R > 0,
            "HAS_IDS": ids_BS is not None,
            "PRECISION": "ieee" if q_BTHV.dtype == torch.float32 else "tf32",  # bf16 products are the same in either
        }

    def grid(self, tokens: int, tile: int) -> tuple[int, int]:
        """Tiles of tokens of each head."""
        return self.B * self.H, triton.cdiv(tokens, tile)
