# ruff: noqa: RUF005 (Triton has no starred tuples)
"""Gated causal depthwise convolution in Triton: one pass over memory forward, one backward.

Legend: B batch, T local sequence, D channels, E = 2D the fused projection [u | gate], K taps, h = K - 1 halo inputs, S ids:
h + T with a halo, T without; P programs along batch and sequence.

Lag j = 0 .. K - 1 is the distance back from an output to an input: c_t = sum_j w_j u_{t-j}, w_j = weight[:, K - 1 - j].
Both passes are bound by memory, so they take views of the projection by their strides, and leave the gradient in one buffer
laid out like it: nothing is copied around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.exchange import Halo
from based_megatron.kernels.gated_conv.reference import filled_up
from based_megatron.kernels.layout import ids_or, laid_out_like, unit_last_stride


class Tile(NamedTuple):
    """Work of one program: channels side by side and tokens of one sequence, of which `rows` are loaded at a time."""

    tokens: int
    rows: int
    channels: int
    warps: int


FORWARD_TILE = Tile(tokens=8, rows=8, channels=256, warps=4)
BACKWARD_TILE = Tile(tokens=128, rows=4, channels=128, warps=1)


@triton.jit
def _document(ids, position, T, K: tl.constexpr, HAS_HALO: tl.constexpr):
    """Document of an input; -1 where there is none."""
    if HAS_HALO:
        return tl.load(ids + position + (K - 1), mask=position < T, other=-1)
    return tl.load(ids + position, mask=(position >= 0) & (position < T), other=-1)


@triton.jit
def _channels_if(condition, d, D):
    """Mask of the channels that exist, empty unless the scalar condition holds."""
    return d < tl.where(condition, D, 0)


@triton.jit
def _forward_kernel(
    u,
    gate,
    weight,
    halo,
    ids,
    y,
    T,
    D,
    u_b,
    u_t,
    gate_b,
    gate_t,
    halo_b,
    halo_t,
    ids_b,
    y_b,
    y_t,
    K: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile [TOKENS, CHANNELS] of y; the K shifted tiles of u overlap, so all but the first come from cache."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    u, gate, y, halo, ids = u + b * u_b, gate + b * gate_b, y + b * y_b, halo + b * halo_b, ids + b * ids_b
    in_tile = (t < T)[:, None] & (d < D)[None, :]
    gate_tile = tl.load(gate + t[:, None] * gate_t + d[None, :], mask=in_tile, other=0).to(tl.float32)
    if HAS_IDS:
        document = _document(ids, t, T, K, HAS_HALO)
    c = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for lag in tl.static_range(K):
        position = t - lag
        seen = position >= 0
        if HAS_IDS:
            other = _document(ids, position, T, K, HAS_HALO)
            same = (other == document) & (other >= 0)
            seen &= same
        term = tl.load(u + position[:, None] * u_t + d[None, :], mask=in_tile & seen[:, None], other=0)
        if HAS_HALO and lag > 0:
            in_halo = position < 0
            if HAS_IDS:
                in_halo &= same
            row = position + (K - 1)
            term += tl.load(halo + row[:, None] * halo_t + d[None, :], mask=in_tile & in_halo[:, None], other=0)
        w = tl.load(weight + d * K + (K - 1 - lag), mask=d < D, other=0).to(tl.float32)
        c += term.to(tl.float32) * w[None, :]
    out = c * tl.sigmoid(c) * gate_tile
    tl.store(y + t[:, None] * y_t + d[None, :], out.to(y.dtype.element_ty), mask=in_tile)


@triton.jit
def _backward_kernel(
    u,
    gate,
    weight,
    halo,
    ids,
    dy,
    du,
    dgate,
    dhalo,
    dweight_PKD,
    T,
    D,
    u_b,
    u_t,
    gate_b,
    gate_t,
    halo_b,
    halo_t,
    ids_b,
    dy_b,
    dy_t,
    du_b,
    du_t,
    dgate_b,
    dgate_t,
    K: tl.constexpr,
    HAS_HALO: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """TOKENS tokens of one sequence, in order, with the last K - 1 inputs and the unfinished du in registers.

    So c_t and its sigmoid are computed once per token, and each input is read once: but for the K - 1 tokens after the last,
    whose dc reaches back into this program's du.
    """
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2).to(tl.int64) * TOKENS
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = d < D
    u, gate, dy, halo, ids = (
        u + b * u_b + d,
        gate + b * gate_b + d,
        dy + b * dy_b + d,
        halo + b * halo_b + d,
        ids + b * ids_b,
    )
    du, dgate, dhalo = du + b * du_b + d, dgate + b * dgate_b + d, dhalo + b * (K - 1) * D + d
    zero = tl.zeros((CHANNELS,), tl.float32)

    w, dw, pending, past, past_documents = (), (), (), (), ()
    for lag in tl.static_range(K):
        w = w + (tl.load(weight + d * K + (K - 1 - lag), mask=exists, other=0).to(tl.float32),)
        dw = dw + (zero,)
    for lag in tl.static_range(1, K):
        position = start - lag
        term = tl.load(u + position * u_t, mask=_channels_if(position >= 0, d, D), other=0)
        if HAS_HALO:
            term += tl.load(halo + (position + K - 1) * halo_t, mask=_channels_if(position < 0, d, D), other=0)
        past = past + (term.to(tl.float32),)
        pending = pending + (zero,)
        if HAS_IDS:
            past_documents = past_documents + (_document(ids, position, T, K, HAS_HALO),)

    end = start + TOKENS
    for first in range(0, tl.minimum(TOKENS, T - start) + K - 1, ROWS):
        # All loads of a few tokens are under way before the first is used.
        u_rows, gate_rows, dy_rows = (), (), ()
        for row in tl.static_range(ROWS):
            t = start + first + row
            loaded = _channels_if((t < T) & (t < end + K - 1), d, D)
            u_rows = u_rows + (tl.load(u + t * u_t, mask=loaded, other=0),)
            gate_rows = gate_rows + (tl.load(gate + t * gate_t, mask=loaded, other=0),)
            dy_rows = dy_rows + (tl.load(dy + t * dy_t, mask=loaded, other=0),)

        for row in tl.static_range(ROWS):
            t = start + first + row
            inputs = (u_rows[row].to(tl.float32),) + past
            if HAS_IDS:
                document = _document(ids, t, T, K, HAS_HALO)
                documents = (document,) + past_documents
                seen_inputs = ()
                for lag in tl.static_range(K):
                    seen = (documents[lag] == document) & (document >= 0)
                    seen_inputs = seen_inputs + (tl.where(seen, inputs[lag], 0.0),)
            else:
                seen_inputs = inputs
            c = zero
            for lag in tl.static_range(K):
                c += w[lag] * seen_inputs[lag]
            sigmoid = tl.sigmoid(c)
            dy_silu = dy_rows[row].to(tl.float32) * sigmoid
            dc = dy_silu * gate_rows[row].to(tl.float32) * (1 + c * (1 - sigmoid))
            own = _channels_if((t < T) & (t < end), d, D)
            tl.store(dgate + t * dgate_t, (dy_silu * c).to(dgate.dtype.element_ty), mask=own)

            # du of this token starts here, and that of the token K - 1 before is complete.
            own_dc = tl.where(t < end, dc, 0.0)
            started, new_dw = (), ()
            for lag in tl.static_range(K):
                new_dw = new_dw + (dw[lag] + own_dc * seen_inputs[lag],)
                du_term = w[lag] * dc
                if HAS_IDS:
                    du_term = tl.where((documents[lag] == document) & (document >= 0), du_term, 0.0)
                if lag > 0:
                    du_term += pending[lag - 1]
                started = started + (du_term,)
            dw = new_dw
            position = t - (K - 1)
            done = started[K - 1]
            finished = _channels_if((position >= start) & (position < T) & (position < end), d, D)
            tl.store(du + position * du_t, done.to(du.dtype.element_ty), mask=finished)
            if HAS_HALO:
                in_halo = _channels_if(position < 0, d, D)
                tl.store(dhalo + (position + K - 1) * D, done.to(dhalo.dtype.element_ty), mask=in_halo)
            pending = started[: K - 1]
            past = inputs[: K - 1]
            if HAS_IDS:
                past_documents = documents[: K - 1]

    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + b
    for lag in tl.static_range(K):
        tl.store(dweight_PKD + (program * K + (K - 1 - lag)) * D + d, dw[lag], mask=exists)


class GatedConv(torch.autograd.Function):
    """(weight, halo, ids, then either [u | gate] or u and gate) to y."""

    @staticmethod
    def forward(
        ctx: Any, weight_DK: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None, *projected: Tensor
    ) -> Tensor:
        u_BTD, gate_BTD = (unit_last_stride(x) for x in _halves(projected))
        halo_BhD = None if halo_BhD is None else unit_last_stride(halo_BhD)
        ctx.save_for_backward(weight_DK, halo_BhD, ids_BS, *projected)
        return gated_conv_forward(u_BTD, gate_BTD, weight_DK, halo_BhD, ids_BS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        weight_DK, halo_BhD, ids_BS, *projected = ctx.saved_tensors
        u_BTD, gate_BTD = (unit_last_stride(x) for x in _halves(projected))
        halo_BhD = None if halo_BhD is None else unit_last_stride(halo_BhD)
        dprojected_BTE, dweight_DK, dhalo_BhD = gated_conv_backward(
            u_BTD, gate_BTD, weight_DK, halo_BhD, ids_BS, unit_last_stride(dy_BTD)
        )
        dparts = (dprojected_BTE,) if len(projected) == 1 else dprojected_BTE.chunk(2, dim=-1)
        return dweight_DK, dhalo_BhD, None, *dparts


class SlicedGatedConv(torch.autograd.Function):
    """([u | gate] of a slice, weight, halo on its way, ids of halo and slice or None) to y."""

    @staticmethod
    def forward(ctx: Any, projected_BTE: Tensor, weight_DK: Tensor, halo: Halo, ids_BS: Tensor | None) -> Tensor:
        u_BTD, gate_BTD = (unit_last_stride(x) for x in _halves((projected_BTE,)))
        halo_BND = halo.arriving.wait()
        halo_BhD, ids_BS = filled_up(halo_BND, ids_BS, weight_DK.shape[1] - 1)
        ctx.save_for_backward(projected_BTE, weight_DK, halo_BhD, ids_BS)
        ctx.back, ctx.halo_rows = halo.back, halo_BND.shape[1]
        return gated_conv_forward(u_BTD, gate_BTD, weight_DK, halo_BhD, ids_BS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        projected_BTE, weight_DK, halo_BhD, ids_BS = ctx.saved_tensors
        u_BTD, gate_BTD = (unit_last_stride(x) for x in _halves((projected_BTE,)))
        dy_BTD, h = unit_last_stride(dy_BTD), halo_BhD.shape[1]
        dhalo_BhD = halo_BhD
        if ctx.halo_rows:
            # Only the first outputs reach back into the halo: its gradient is on the way before the others are begun.
            first = slice(0, h)
            first_ids = None if ids_BS is None else ids_BS[:, : h + u_BTD[:, first].shape[1]]
            *_, dhalo = gated_conv_backward(
                u_BTD[:, first], gate_BTD[:, first], weight_DK, halo_BhD, first_ids, dy_BTD[:, first]
            )
            assert dhalo is not None
            dhalo_BhD = dhalo
        returning = ctx.back.start_return(dhalo_BhD[:, h - ctx.halo_rows :])
        dprojected_BTE, dweight_DK, _ = gated_conv_backward(u_BTD, gate_BTD, weight_DK, halo_BhD, ids_BS, dy_BTD)
        late_BtD = returning.wait()
        dprojected_BTE[:, u_BTD.shape[1] - late_BtD.shape[1] :, : u_BTD.shape[2]] += late_BtD
        return dprojected_BTE, dweight_DK, None, None


def gated_conv_forward(
    u_BTD: Tensor,
    gate_BTD: Tensor,
    weight_DK: Tensor,
    halo_BhD: Tensor | None,
    ids_BS: Tensor | None,
    tile: Tile = FORWARD_TILE,
) -> Tensor:
    """y_BTD, laid out like u; last strides are 1."""
    B, T, D = u_BTD.shape
    K = weight_DK.shape[1]
    y_BTD = laid_out_like(u_BTD, D)
    halo_or_u = u_BTD if halo_BhD is None else halo_BhD
    ids_or_u, ids_b = ids_or(u_BTD, ids_BS)
    grid = (triton.cdiv(D, tile.channels), B, triton.cdiv(T, tile.tokens))
    _forward_kernel[grid](
        u_BTD,
        gate_BTD,
        weight_DK.contiguous(),
        halo_or_u,
        ids_or_u,
        y_BTD,
        T,
        D,
        *u_BTD.stride()[:2],
        *gate_BTD.stride()[:2],
        *halo_or_u.stride()[:2],
        ids_b,
        *y_BTD.stride()[:2],
        K=K,
        HAS_HALO=halo_BhD is not None,
        HAS_IDS=ids_BS is not None,
        TOKENS=tile.tokens,
        CHANNELS=tile.channels,
        num_warps=tile.warps,
    )
    return y_BTD


def gated_conv_backward(
    u_BTD: Tensor,
    gate_BTD: Tensor,
    weight_DK: Tensor,
    halo_BhD: Tensor | None,
    ids_BS: Tensor | None,
    dy_BTD: Tensor,
    tile: Tile = BACKWARD_TILE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """([du | dgate], laid out like u, dweight, dhalo); last strides are 1."""
    B, T, D = u_BTD.shape
    K = weight_DK.shape[1]
    assert tile.tokens >= K - 1, (tile, K)
    dprojected_BTE = laid_out_like(u_BTD, 2 * D)
    du_BTD, dgate_BTD = dprojected_BTE.chunk(2, dim=-1)
    dhalo_BhD = None if halo_BhD is None else torch.empty(B, K - 1, D, dtype=halo_BhD.dtype, device=u_BTD.device)
    halo_or_u = u_BTD if halo_BhD is None else halo_BhD
    ids_or_u, ids_b = ids_or(u_BTD, ids_BS)
    grid = (triton.cdiv(D, tile.channels), B, triton.cdiv(T, tile.tokens))
    dweight_PKD = torch.empty(grid[1] * grid[2], K, D, dtype=torch.float32, device=u_BTD.device)
    _backward_kernel[grid](
        u_BTD,
        gate_BTD,
        weight_DK.contiguous(),
        halo_or_u,
        ids_or_u,
        dy_BTD,
        du_BTD,
        dgate_BTD,
        du_BTD if dhalo_BhD is None else dhalo_BhD,
        dweight_PKD,
        T,
        D,
        *u_BTD.stride()[:2],
        *gate_BTD.stride()[:2],
        *halo_or_u.stride()[:2],
        ids_b,
        *dy_BTD.stride()[:2],
        *du_BTD.stride()[:2],
        *dgate_BTD.stride()[:2],
        K=K,
        HAS_HALO=halo_BhD is not None,
        HAS_IDS=ids_BS is not None,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        CHANNELS=tile.channels,
        num_warps=tile.warps,
    )
    # One partial sum per program, added in their order: the same bits in every run.
    dweight_DK = dweight_PKD.sum(0).t().to(weight_DK.dtype)
    return dprojected_BTE, dweight_DK, dhalo_BhD


def gated_conv(
    projected: tuple[Tensor, ...], weight_DK: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None
) -> Tensor:
    """silu(conv(u)) * gate; `projected` is ([u | gate],) or (u, gate). See the package's functions."""
    return GatedConv.apply(weight_DK, halo_BhD, ids_BS, *projected)


def _halves(projected: Sequence[Tensor]) -> Sequence[Tensor]:
    return projected[0].chunk(2, dim=-1) if len(projected) == 1 else projected
