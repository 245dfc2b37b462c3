"""Sliding window attention in Triton, flash style: scores never reach device memory.

Legend: B batch, T queries, S keys (S - T of them before the first query), N keys of a halo, H heads, V head dim, W window_left.
Query i and key j have positions i + (S - T) and j; i sees j where 0 <= position difference <= W.
The first N keys may lie apart from the others, in a halo that came from another rank: nothing is copied to join them.

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
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.exchange import Halo, HaloReturn
from based_megatron.kernels.layout import Operand, ids_operand, laid_out_like, operand, unit_last_stride
from based_megatron.kernels.sliding_window import triton_kernels

BITS = 1.4426950408889634
"""log2(e)."""


class Tile(NamedTuple):
    """Work of one program, and how the compiler schedules it."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Launch arguments of a kernel."""
        return {
            "TILE_QUERIES": self.queries,
            "TILE_KEYS": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkdv: Tile


def default_tiles(padded_head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles that fill the tensor cores and keep accumulators in registers; fp32 products run outside the tensor cores."""
    if dtype == torch.float32:
        tile = Tile(32, 32, 8, 1)
        return Tiles(tile, tile, tile)
    # The fastest of those measured on an H200 at head dims 64 and 112.
    if padded_head_dim <= 64:
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
    return Tiles(Tile(64, 64, 4, 1), Tile(64, 32, 4, 2), Tile(32, 64, 4, 1))


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
        halo_BN2HV = None if halo is None else halo.arriving.wait()
        o_BTHV, lse_BHT = attention_forward(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo_BN2HV)
        ctx.save_for_backward(q_BTHV, k_BTHV, v_BTHV, o_BTHV, lse_BHT, ids_BS, halo_BN2HV)
        ctx.window_left, ctx.back = window_left, None if halo is None else halo.back
        return o_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHV, k_BTHV, v_BTHV, o_BTHV, lse_BHT, ids_BS, halo_BN2HV = ctx.saved_tensors
        do_BTHV = unit_last_stride(do_BTHV)
        gradients = attention_backward(
            q_BTHV, k_BTHV, v_BTHV, o_BTHV, lse_BHT, do_BTHV, ctx.window_left, ids_BS, halo_BN2HV, ctx.back
        )
        return *gradients, None, None, None


def attention_forward(
    q_BTHV: Tensor,
    k_BTHV: Tensor,
    v_BTHV: Tensor,
    window_left: int,
    ids_BS: Tensor | None,
    halo_BN2HV: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(o_BTHV, laid out like q, and lse_BHT, fp32 in bits); last strides are 1. A halo has keys and values of N earlier tokens."""
    call = _Call(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo_BN2HV)
    tile = tile or default_tiles(call.constants["PADDED_V"], q_BTHV.dtype).forward
    o_BTHV = laid_out_like(q_BTHV)
    lse_BHT = torch.empty(call.B, call.H, call.T, dtype=torch.float32, device=q_BTHV.device)
    triton_kernels.forward_kernel[call.grid(call.T, tile.queries)](
        *call.qkv,
        operand(o_BTHV),
        lse_BHT,
        call.ids,
        *call.halo,
        *call.sizes,
        call.scale * BITS,
        **call.constants,
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
    halo_BN2HV: Tensor | None = None,
    back: HaloReturn | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_BTHV, dk_BTHV, dv_BTHV), laid out like q, k and v, from what `attention_forward` returned; last strides are 1.

    With `back`, the gradient of the halo goes home while that of the other keys is computed, and what comes is in dk and dv.
    """
    call = _Call(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo_BN2HV)
    _, dq_tile, dkdv_tile = tiles or default_tiles(call.constants["PADDED_V"], q_BTHV.dtype)
    dq_BTHV, dk_BTHV, dv_BTHV = (laid_out_like(x) for x in (q_BTHV, k_BTHV, v_BTHV))
    delta_BHT = torch.empty_like(lse_BHT)
    sizes = (*call.sizes, call.scale, call.scale * BITS)
    do = operand(do_BTHV)
    # First dq, which leaves delta for dk.
    triton_kernels.dq_kernel[call.grid(call.T, dq_tile.queries)](
        *call.qkv,
        operand(o_BTHV),
        do,
        lse_BHT,
        operand(dq_BTHV),
        delta_BHT,
        call.ids,
        *call.halo,
        *sizes,
        **call.constants,
        **dq_tile.options(),
    )
    dhalo_BN2HV = q_BTHV.new_empty(call.B, call.N, 2, *q_BTHV.shape[2:])
    dk, dv = operand(dk_BTHV), operand(dv_BTHV)
    dhalo = _halo_operand(dhalo_BN2HV) if call.N else (dk, dv_BTHV)

    def keys_and_values(first_tile: int, tile_count: int) -> None:
        if not tile_count:
            return
        triton_kernels.dkdv_kernel[call.B * call.H, tile_count](
            *call.qkv,
            do,
            lse_BHT,
            delta_BHT,
            dk,
            dv,
            *dhalo,
            call.ids,
            *call.halo,
            *sizes,
            first_tile,
            **call.constants,
            **dkdv_tile.options(),
        )

    halo_tiles = triton.cdiv(call.N, dkdv_tile.keys)
    keys_and_values(0, halo_tiles)
    returning = None if back is None else back.start_return(dhalo_BN2HV)
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


def _keys_and_values(x_BN2HV: Tensor) -> tuple[Tensor, Tensor]:
    return x_BN2HV[:, :, 0], x_BN2HV[:, :, 1]


def _halo_operand(halo_BN2HV: Tensor) -> tuple[Operand, Tensor]:
    """The keys as an operand, and the values, whose strides are the same."""
    k_BNHV, v_BNHV = _keys_and_values(halo_BN2HV)
    return operand(k_BNHV), v_BNHV


class _Call:
    """Arguments that the kernels of one call have in common."""

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
        self.N = 0 if halo is None else halo.shape[1]
        self.S = self.N + k_BTHV.shape[1]
        self.qkv = _, k, v = operand(q_BTHV), operand(k_BTHV), operand(v_BTHV)
        self.halo = (k, v.ptr) if halo is None or not self.N else _halo_operand(halo)
        self.sizes = (self.T, self.S, self.N, self.H, min(window_left, self.S))
        self.scale = V**-0.5
        self.ids = ids_operand(ids_BS, q_BTHV)
        # Tensor cores want head dims of a power of two, 16 at least.
        self.constants = {
            "V": V,
            "PADDED_V": max(16, triton.next_power_of_2(V)),
            "HAS_HALO": self.N > 0,
            "HAS_IDS": ids_BS is not None,
            "PRECISION": "ieee" if q_BTHV.dtype == torch.float32 else "tf32",  # bf16 products are the same in either
        }

    def grid(self, tokens: int, tile: int) -> tuple[int, int]:
        """Tiles of tokens of each head."""
        return self.B * self.H, triton.cdiv(tokens, tile)
