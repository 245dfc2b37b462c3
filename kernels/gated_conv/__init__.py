"""Gated causal depthwise convolution, the short-range mixer of Based, and that of Mamba, which has a bias in place of a gate.

Legend: B batch, T tokens, D channels, E = 2D channels of the fused projection, K taps, h = K - 1 halo inputs, N of them that exist,
S inputs including the halo if given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.exchange import Halo, ReceivedHalo
from based_megatron.kernels.gated_conv import reference
from based_megatron.kernels.gated_conv.reference import filled_up

__all__ = ["gated_conv", "gated_conv_fused", "gated_conv_over_slices", "silu_conv"]


def gated_conv(
    u_BTD: Tensor,
    gate_BTD: Tensor,
    weight_DK: Tensor,
    *,
    halo_BhD: Tensor | None = None,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """y_t = silu(sum_k weight[:, k] * u_{t-(K-1)+k}) * gate_t.

    Args:
        u_BTD, gate_BTD: fp64, fp32 or bf16; sums are in fp32 or wider. fp64 runs in the reference whatever the backend.
        weight_DK: tap K - 1 multiplies the current token.
        halo_BhD: the K - 1 inputs before u; None is zeros.
        key_document_ids_BS: document of each input, halo first if there is one (S = K - 1 + T, else S = T). Inputs of
            another document count as zero, and so does id -1: an input that does not exist.
        backend: a name from `resolve_backend`.

    Returns: y_BTD in the dtype of u; gradients flow to u, gate, weight and halo.

    >>> u_BTD, gate_BTD, weight_DK = torch.randn(2, 7, 8), torch.randn(2, 7, 8), torch.randn(8, 3)
    >>> y_BTD = gated_conv(u_BTD, gate_BTD, weight_DK)
    >>> rest = gated_conv(u_BTD[:, 4:], gate_BTD[:, 4:], weight_DK, halo_BhD=u_BTD[:, 2:4])
    >>> torch.allclose(rest, y_BTD[:, 4:])
    True
    """
    return _run((u_BTD, gate_BTD), weight_DK, halo_BhD, key_document_ids_BS, backend)


def gated_conv_fused(
    projected_BTE: Tensor,
    weight_DK: Tensor,
    *,
    halo_BhD: Tensor | None = None,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """`gated_conv` of the halves [u | gate] of one projection, whose gradient needs no joining of two halves.

    The Triton kernels lay y and that gradient out like the projection, with batch or tokens outermost in memory.

    >>> projected_BTE, weight_DK = torch.randn(2, 7, 2 * 8), torch.randn(8, 3)
    >>> y_BTD = gated_conv_fused(projected_BTE, weight_DK)
    >>> torch.equal(y_BTD, gated_conv(*projected_BTE.chunk(2, dim=-1), weight_DK))
    True
    """
    return _run((projected_BTE,), weight_DK, halo_BhD, key_document_ids_BS, backend)


def gated_conv_over_slices(
    projected_BTE: Tensor,
    weight_DK: Tensor,
    halo: Halo,
    *,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """`gated_conv_fused` of one slice of a sequence, whose earlier inputs u are a halo [B, N, D] on its way, N < K.

    Document ids are those of the halo and of the slice, S = N + T. Gradients flow to the projections of all slices.

    >>> class Received:
    ...     # A halo that has come.
    ...     def __init__(self, rows): self.rows = rows
    ...     def wait(self): return self.rows
    >>> projected_BTE, weight_DK = torch.randn(2, 7, 2 * 8), torch.randn(8, 3)
    >>> halo = Halo(arriving=Received(projected_BTE[:, 2:4, :8]), back=None)  # forward only: nothing goes back
    >>> y_BTD = gated_conv_over_slices(projected_BTE[:, 4:], weight_DK, halo)
    >>> torch.allclose(y_BTD, gated_conv_fused(projected_BTE, weight_DK)[:, 4:])
    True
    """
    run = implementation("gated_conv", backend, {"reference": _reference_sliced, "triton": _triton_sliced})
    return run(projected_BTE, weight_DK, halo, key_document_ids_BS)


def silu_conv(
    u_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    *,
    halo_BhD: Tensor | None = None,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """y_t = silu(bias + sum_k weight[:, k] * u_{t-(K-1)+k}); the arguments are those of `gated_conv`.

    >>> silu_conv(torch.ones(1, 3, 1), torch.ones(1, 2), torch.zeros(1)).squeeze().tolist() == [
    ...     torch.nn.functional.silu(torch.tensor(x)).item() for x in (1.0, 2.0, 2.0)
    ... ]
    True
    """
    _check(u_BTD.shape[1], weight_DK.shape[1], halo_BhD, key_document_ids_BS)
    run = implementation("gated_conv", backend, {"reference": _reference_silu, "triton": _triton_silu})
    return run(u_BTD, weight_DK, bias_D, halo_BhD, key_document_ids_BS)


def _check(T: int, K: int, halo_BhD: Tensor | None, ids_BS: Tensor | None) -> None:
    assert halo_BhD is None or halo_BhD.shape[1] == K - 1, (halo_BhD.shape, K)
    inputs = T if halo_BhD is None else K - 1 + T
    assert ids_BS is None or ids_BS.shape[1] == inputs, (ids_BS.shape, inputs)


def _run(
    projected: tuple[Tensor, ...], weight_DK: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None, backend: str
) -> Tensor:
    T, (D, K) = projected[0].shape[1], weight_DK.shape
    assert sum(x.shape[-1] for x in projected) == 2 * D, ([x.shape for x in projected], D)
    _check(T, K, halo_BhD, ids_BS)
    run = implementation("gated_conv", backend, {"reference": _reference, "triton": _triton})
    return run(projected, weight_DK, halo_BhD, ids_BS)


def _reference(
    projected: tuple[Tensor, ...], weight_DK: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None
) -> Tensor:
    u_BTD, gate_BTD = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
    return reference.gated_conv(u_BTD, gate_BTD, weight_DK, halo_BhD, ids_BS)


def _triton(projected: tuple[Tensor, ...], weight_DK: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None) -> Tensor:
    if projected[0].dtype == torch.float64:
        return _reference(projected, weight_DK, halo_BhD, ids_BS)
    from based_megatron.kernels.gated_conv import triton_conv  # Triton is there on machines with a GPU only.

    return triton_conv.gated_conv(projected, weight_DK, halo_BhD, ids_BS)


def _reference_sliced(projected_BTE: Tensor, weight_DK: Tensor, halo: Halo, ids_BS: Tensor | None) -> Tensor:
    halo_BND = ReceivedHalo.apply(projected_BTE[..., : weight_DK.shape[0]], halo)
    return _reference((projected_BTE,), weight_DK, *filled_up(halo_BND, ids_BS, weight_DK.shape[1] - 1))


def _triton_sliced(projected_BTE: Tensor, weight_DK: Tensor, halo: Halo, ids_BS: Tensor | None) -> Tensor:
    if projected_BTE.dtype == torch.float64:
        return _reference_sliced(projected_BTE, weight_DK, halo, ids_BS)
    from based_megatron.kernels.gated_conv import triton_conv

    return triton_conv.SlicedGatedConv.apply(projected_BTE, weight_DK, halo, ids_BS)


def _reference_silu(
    u_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor, halo_BhD: Tensor | None, ids_BS: Tensor | None
) -> Tensor:
    return reference.gated_conv(u_BTD, None, weight_DK, halo_BhD, ids_BS, bias_D)


def _triton_silu(u_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor, *others: Tensor | None) -> Tensor:
    if u_BTD.dtype == torch.float64:
        return _reference_silu(u_BTD, weight_DK, bias_D, *others)
    from based_megatron.kernels.gated_conv import triton_conv

    return triton_conv.SiluConv.apply(u_BTD, weight_DK, bias_D, *others)
