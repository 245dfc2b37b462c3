"""Gated causal depthwise convolution in Triton: one pass over memory forward, one backward.

Legend: B batch, T tokens, D channels, E = 2D the fused projection [u | gate], K taps, h = K - 1 halo inputs, N of them that exist,
S ids: h + T with a halo, T without.

Both passes are bound by memory, so they take views of the projection by their strides, and leave the gradient in one buffer
laid out like it: nothing is copied around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.exchange import Halo
from based_megatron.kernels.gated_conv import triton_kernels
from based_megatron.kernels.gated_conv.reference import filled_up
from based_megatron.kernels.layout import ids_operand, laid_out_like, operand, unit_last_stride


class Tile(NamedTuple):
    """Work of one program: channels next to each other and tokens of one sequence, of which `rows` are loaded at a time."""

    tokens: int
    rows: int
    channels: int
    warps: int


FORWARD_TILE = Tile(tokens=8, rows=8, channels=256, warps=4)
BACKWARD_TILE = Tile(tokens=128, rows=4, channels=128, warps=1)


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


class SiluConv(torch.autograd.Function):
    """(u, weight, bias, halo, ids) to silu(conv(u) + bias)."""

    @staticmethod
    def forward(
        ctx: Any, u_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None
    ) -> Tensor:
        u_BTD, halo_BhD = unit_last_stride(u_BTD), None if halo_BhD is None else unit_last_stride(halo_BhD)
        ctx.save_for_backward(u_BTD, weight_DK, bias_D, halo_BhD, ids_BS)
        return gated_conv_forward(u_BTD, None, weight_DK, halo_BhD, ids_BS, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        u_BTD, weight_DK, bias_D, halo_BhD, ids_BS = ctx.saved_tensors
        du_BTD, dweight, dhalo_BhD = gated_conv_backward(
            u_BTD, None, weight_DK, halo_BhD, ids_BS, unit_last_stride(dy_BTD), bias_D
        )
        return du_BTD, dweight[:, :-1], dweight[:, -1].to(bias_D.dtype), dhalo_BhD, None


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
    gate_BTD: Tensor | None,
    weight_DK: Tensor,
    halo_BhD: Tensor | None,
    ids_BS: Tensor | None,
    bias_D: Tensor | None = None,
    tile: Tile = FORWARD_TILE,
) -> Tensor:
    """y_BTD, laid out like u; last strides are 1."""
    B, T, D = u_BTD.shape
    K = weight_DK.shape[1]
    y_BTD = laid_out_like(u_BTD, D)
    grid = (triton.cdiv(D, tile.channels), B, triton.cdiv(T, tile.tokens))
    triton_kernels.forward_kernel[grid](
        operand(u_BTD),
        operand(u_BTD if gate_BTD is None else gate_BTD),
        weight_DK.contiguous(),
        weight_DK if bias_D is None else bias_D,
        operand(u_BTD if halo_BhD is None else halo_BhD),
        ids_operand(ids_BS, u_BTD),
        operand(y_BTD),
        T,
        D,
        K=K,
        HAS_GATE=gate_BTD is not None,
        HAS_BIAS=bias_D is not None,
        HAS_HALO=halo_BhD is not None,
        HAS_IDS=ids_BS is not None,
        TILE_TOKENS=tile.tokens,
        TILE_CHANNELS=tile.channels,
        num_warps=tile.warps,
    )
    return y_BTD


def gated_conv_backward(
    u_BTD: Tensor,
    gate_BTD: Tensor | None,
    weight_DK: Tensor,
    halo_BhD: Tensor | None,
    ids_BS: Tensor | None,
    dy_BTD: Tensor,
    bias_D: Tensor | None = None,
    tile: Tile = BACKWARD_TILE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """([du | dgate] or du alone, laid out like u, [dweight | dbias] or dweight alone, dhalo); last strides are 1."""
    B, T, D = u_BTD.shape
    K = weight_DK.shape[1]
    assert tile.tokens >= K - 1, (tile, K)
    dprojected_BTE = laid_out_like(u_BTD, D if gate_BTD is None else 2 * D)
    du_BTD, dgate_BTD = dprojected_BTE[..., :D], dprojected_BTE[..., -D:]
    dhalo_BhD = None if halo_BhD is None else torch.empty(B, K - 1, D, dtype=halo_BhD.dtype, device=u_BTD.device)
    grid = (triton.cdiv(D, tile.channels), B, triton.cdiv(T, tile.tokens))
    rows = K if bias_D is None else K + 1
    partial_dweight = torch.empty(grid[1] * grid[2], rows, D, dtype=torch.float32, device=u_BTD.device)
    triton_kernels.backward_kernel[grid](
        operand(u_BTD),
        operand(u_BTD if gate_BTD is None else gate_BTD),
        weight_DK.contiguous(),
        weight_DK if bias_D is None else bias_D,
        operand(u_BTD if halo_BhD is None else halo_BhD),
        ids_operand(ids_BS, u_BTD),
        operand(dy_BTD),
        operand(du_BTD),
        operand(dgate_BTD),
        du_BTD if dhalo_BhD is None else dhalo_BhD,
        partial_dweight,
        T,
        D,
        K=K,
        HAS_GATE=gate_BTD is not None,
        HAS_BIAS=bias_D is not None,
        HAS_HALO=halo_BhD is not None,
        HAS_IDS=ids_BS is not None,
        TILE_TOKENS=tile.tokens,
        TILE_ROWS=tile.rows,
        TILE_CHANNELS=tile.channels,
        num_warps=tile.warps,
    )
    # One partial sum per program, added in their order: the same bits in every run.
    dweight_DK = partial_dweight.sum(0).t().to(weight_DK.dtype)
    return dprojected_BTE, dweight_DK, dhalo_BhD


def gated_conv(
    projected: tuple[Tensor, ...], weight_DK: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None
) -> Tensor:
    """silu(conv(u)) * gate; `projected` is ([u | gate],) or (u, gate). See the package's functions."""
    return GatedConv.apply(weight_DK, halo_BhD, ids_BS, *projected)


def _halves(projected: Sequence[Tensor]) -> Sequence[Tensor]:
    return projected[0].chunk(2, dim=-1) if len(projected) == 1 else projected
