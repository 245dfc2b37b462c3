"""Causal depthwise convolutions of a few taps with a bias.

Legend: B sequences, T tokens, C channels, K taps, h = K - 1 inputs in front.
"""

import torch
from torch import Tensor
from torch.nn import functional


def few_taps(
    u_BTC: Tensor,
    taps_CK: Tensor,
    bias_C: Tensor,
    *,
    halo_BhC: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> Tensor:
    """bias + sum_k taps[:, k] u_(t - (K-1) + k) over inputs of the document of t, in fp32 or wider.

    halo_BhC: the inputs in front of the first, which belong to its document; none if it is None.
    """
    T, K = u_BTC.shape[1], taps_CK.shape[1]
    dtype = torch.promote_types(u_BTC.dtype, torch.float32)
    before = u_BTC.new_zeros(u_BTC.shape[0], K - 1, u_BTC.shape[2]) if halo_BhC is None else halo_BhC
    inputs, taps_CK = torch.cat([before, u_BTC], dim=1), taps_CK.to(dtype)
    total = bias_C.to(dtype) + u_BTC * taps_CK[:, K - 1]
    for lag in range(1, K):
        term = inputs[:, K - 1 - lag : K - 1 - lag + T] * taps_CK[:, K - 1 - lag]
        if document_ids_BT is not None:
            same = functional.pad(document_ids_BT[:, lag:] == document_ids_BT[:, :-lag], (min(lag, T), 0), value=False)
            if halo_BhC is not None:
                same = same | (document_ids_BT == document_ids_BT[:, :1]) & (torch.arange(T, device=u_BTC.device) < lag)
            term = term * same[..., None]
        total = total + term
    return total
