"""Causal depthwise convolutions of sequences [B, C, T]: of a few taps, and as long as the sequence.

Legend: B sequences, C channels, T tokens, K taps, X any dimensions before the last.
"""

import torch
from torch import Tensor
from torch.nn import functional


def few_taps(u_BCT: Tensor, taps_CK: Tensor, bias_C: Tensor) -> Tensor:
    """bias + sum_k taps[:, k] u_(t - (K-1) + k), where inputs before the first token are 0, in fp32 or wider."""
    (T, K), dtype = (u_BCT.shape[-1], taps_CK.shape[1]), torch.promote_types(u_BCT.dtype, torch.float32)
    inputs, taps_CK = functional.pad(u_BCT, (K - 1, 0)).to(dtype), taps_CK.to(dtype)
    total = bias_C.to(dtype)[:, None]
    for tap in range(K):
        total = torch.addcmul(total, inputs[..., tap : tap + T], taps_CK[:, tap, None])
    return total


def long_convolution(u_XT: Tensor, filter_XT: Tensor) -> Tensor:
    """sum_(j <= t) filter_j u_(t - j) by Fourier transforms, in fp32 or wider; dimensions before the last broadcast.

    Transforms are twice as long as the sequence, so that its end does not reach its beginning.

    >>> u, impulse = torch.randn(2, 3, 7), torch.eye(7)[2]
    >>> torch.allclose(long_convolution(u, impulse)[..., 2:], u[..., :-2], atol=1e-5)  # two tokens later
    True
    """
    T, dtype = u_XT.shape[-1], torch.promote_types(u_XT.dtype, torch.float32)
    length = 1 << (2 * T - 1).bit_length()
    spectrum = torch.fft.rfft(u_XT.to(dtype), length) * torch.fft.rfft(filter_XT.to(dtype), length)
    return torch.fft.irfft(spectrum, length)[..., :T]
