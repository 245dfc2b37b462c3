"""Gated causal depthwise convolution: the short-range mixer of Based.

Legend: B batch, T local sequence, D channels, K taps, h = K - 1 halo inputs, S = inputs including the halo if given.
"""

from __future__ import annotations

from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.gated_conv import reference

__all__ = ["gated_conv"]


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
        u_BTD, gate_BTD: fp64, fp32 or bf16; sums are in fp32 or wider.
        weight_DK: tap K - 1 multiplies the current token.
        halo_BhD: the K - 1 inputs before u; None is zeros.
        key_document_ids_BS: document of each input, halo first if there is one (S = K - 1 + T, else S = T). Inputs of
            another document count as zero, and so does id -1: an input that does not exist.
        backend: a name from `resolve_backend`.

    Returns: y_BTD in the dtype of u; gradients flow to u, gate, weight and halo.
    """
    T, K = u_BTD.shape[1], weight_DK.shape[1]
    assert halo_BhD is None or halo_BhD.shape[1] == K - 1, (halo_BhD.shape, K)
    inputs = T if halo_BhD is None else K - 1 + T
    assert key_document_ids_BS is None or key_document_ids_BS.shape[1] == inputs, (key_document_ids_BS.shape, inputs)
    run = implementation("gated_conv", backend, {"reference": reference.gated_conv})
    return run(u_BTD, gate_BTD, weight_DK, halo_BhD, key_document_ids_BS)
