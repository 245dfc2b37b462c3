"""Causal depthwise convolutions: of a few taps, and as long as the sequence.

Legend: B batch, T tokens, C channels, K taps, h = K - 1 inputs in front of a convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def short_convolution(u_BTC: Tensor, taps_CK: Tensor, *, document_ids_BT: Tensor | None = None) -> Tensor:
    """sum_k taps[:, k] u_{t-(K-1)+k} over the inputs of t's document, in the dtype of u; sums are in fp32 or wider."""
    (T, K), dtype = (u_BTC.shape[1], taps_CK.shape[1]), torch.promote_types(u_BTC.dtype, torch.float32)
    u, taps_CK = u_BTC.to(dtype), taps_CK.to(dtype)
    y = u * taps_CK[:, K - 1]
    for back in range(1, min(K, T)):
        seen = u[:, :-back]
        if document_ids_BT is not None:
            seen = seen * (document_ids_BT[:, back:] == document_ids_BT[:, :-back])[..., None]
        y = y + functional.pad(seen * taps_CK[:, K - 1 - back], (0, 0, back, 0))
    return y.to(u_BTC.dtype)


def long_convolution(u_BCT: Tensor, filter_CT: Tensor) -> Tensor:
    """sum_{j<=t} filter_j u_{t-j}, by Fourier transforms of twice the length, in fp32 or wider and the dtype of u.

    Filters may have more dimensions than channels: [.., T], broadcast against u.
    """
    T, dtype = u_BCT.shape[-1], torch.promote_types(u_BCT.dtype, torch.float32)
    length = 2 ** (2 * T - 1).bit_length() if T > 1 else 2
    spectrum = torch.fft.rfft(u_BCT.to(dtype), n=length) * torch.fft.rfft(filter_CT.to(dtype), n=length)
    return torch.fft.irfft(spectrum, n=length)[..., :T].to(u_BCT.dtype)
