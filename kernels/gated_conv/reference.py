"""Gated causal depthwise convolution in plain PyTorch; backward recomputes, so only the inputs are saved.

Legend: B batch, T tokens, D channels, K taps, h = K - 1 halo inputs, N of them that exist, S = h + T inputs with the halo in front.

    c_t = bias + sum_k weight[:, k] * u_{t-(K-1)+k},   y_t = silu(c_t) * gate_t, without a bias or a gate where there is none
    dgate = dy silu(c),  dc = dy gate silu'(c)
    du_s = sum_k weight[:, k] dc_{s+(K-1)-k},  dweight_k = sum_t dc_t u_{t-(K-1)+k}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _seen(document_ids_BS: Tensor | None, tap: int, taps: int) -> Tensor | float:
    """[B, T, 1] factor: 1 where the input under this tap exists and is in the output's document."""
    if document_ids_BS is None:
        return 1.0
    T = document_ids_BS.shape[1] - (taps - 1)
    input_ids_BT, output_ids_BT = document_ids_BS[:, tap : tap + T], document_ids_BS[:, taps - 1 :]
    return ((input_ids_BT == output_ids_BT) & (input_ids_BT >= 0)).unsqueeze(-1)


class GatedConv(torch.autograd.Function):
    """(inputs with halo, gate or None, weight, bias or None, ids of the inputs) to y."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BSD: Tensor,
        gate_BTD: Tensor | None,
        weight_DK: Tensor,
        bias_D: Tensor | None,
        document_ids_BS: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(u_BSD, gate_BTD, weight_DK, bias_D, document_ids_BS)
        y_BTD = functional.silu(_convolve(u_BSD, weight_DK, bias_D, document_ids_BS))
        return (y_BTD if gate_BTD is None else y_BTD * gate_BTD).to(u_BSD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        u_BSD, gate_BTD, weight_DK, bias_D, document_ids_BS = ctx.saved_tensors
        T, K = dy_BTD.shape[1], weight_DK.shape[1]
        c_BTD = _convolve(u_BSD, weight_DK, bias_D, document_ids_BS)
        dy_BTD = dy_BTD.to(c_BTD.dtype)
        sigmoid_BTD = c_BTD.sigmoid()
        dgate_BTD = None if gate_BTD is None else (dy_BTD * c_BTD * sigmoid_BTD).to(gate_BTD.dtype)
        dsilu_BTD = dy_BTD if gate_BTD is None else dy_BTD * gate_BTD
        dc_BTD = dsilu_BTD * sigmoid_BTD * (1 + c_BTD * (1 - sigmoid_BTD))
        du_BSD = torch.zeros_like(u_BSD, dtype=dc_BTD.dtype)
        dweight_DK = torch.empty_like(weight_DK, dtype=dc_BTD.dtype)
        for tap in range(K):
            seen_dc_BTD = dc_BTD * _seen(document_ids_BS, tap, K)
            du_BSD[:, tap : tap + T] += seen_dc_BTD * weight_DK[:, tap]
            dweight_DK[:, tap] = (seen_dc_BTD * u_BSD[:, tap : tap + T]).sum((0, 1))
        dbias_D = None if bias_D is None else dc_BTD.sum((0, 1)).to(bias_D.dtype)
        return du_BSD.to(u_BSD.dtype), dgate_BTD, dweight_DK.to(weight_DK.dtype), dbias_D, None


def _convolve(u_BSD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, document_ids_BS: Tensor | None) -> Tensor:
    """The convolution and its bias alone, in fp32 (fp64 for fp64 inputs)."""
    B, S, D = u_BSD.shape
    K = weight_DK.shape[1]
    T = S - (K - 1)
    dtype = torch.promote_types(u_BSD.dtype, torch.float32)
    c_BTD = torch.zeros(B, T, D, dtype=dtype, device=u_BSD.device)
    for tap in range(K):
        c_BTD += u_BSD[:, tap : tap + T].to(dtype) * weight_DK[:, tap] * _seen(document_ids_BS, tap, K)
    return c_BTD if bias_D is None else c_BTD + bias_D


def gated_conv(
    u_BTD: Tensor,
    gate_BTD: Tensor | None,
    weight_DK: Tensor,
    halo_BhD: Tensor | None,
    key_document_ids_BS: Tensor | None,
    bias_D: Tensor | None = None,
) -> Tensor:
    """silu(conv(u) + bias) * gate; see the package's functions."""
    left = weight_DK.shape[1] - 1
    if halo_BhD is None:
        u_BSD = functional.pad(u_BTD, (0, 0, left, 0))
        if key_document_ids_BS is not None:
            key_document_ids_BS = functional.pad(key_document_ids_BS, (left, 0), value=-1)
    else:
        u_BSD = torch.cat([halo_BhD, u_BTD], dim=1)
    return GatedConv.apply(u_BSD, gate_BTD, weight_DK, bias_D, key_document_ids_BS)


def filled_up(halo_BND: Tensor, ids_BS: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """A halo of N inputs, filled up to `rows` with inputs that do not exist before them, and the ids of the halo and the slice likewise."""
    missing = rows - halo_BND.shape[1]
    ids_BS = None if ids_BS is None else functional.pad(ids_BS, (missing, 0), value=-1)
    return functional.pad(halo_BND, (0, 0, missing, 0)), ids_BS
