"""Causal depthwise convolutions as long as the sequence.

Legend: T tokens, X any dimensions before the last.
"""

import torch
from torch import Tensor


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
