"""Layer norm of each head's vector, with a scale and a shift of its own.

Legend: B batch, T tokens, H heads, F feature dim.
"""

from __future__ import annotations

from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.head_norm import reference

__all__ = ["head_norm"]


def head_norm(x_BTHF: Tensor, weight_HF: Tensor, bias_HF: Tensor, eps: float, *, backend: str = "reference") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, mean and variance of each head's F numbers.

    Args:
        x_BTHF: any leading dims; fp64, fp32 or bf16. Computed in fp32 or wider.
        weight_HF, bias_HF: in any float dtype.
        backend: a name from `resolve_backend`.

    Returns: the norm in the shape and dtype of x.

    >>> import torch
    >>> x_BTHF = torch.randn(2, 5, 3, 8)
    >>> normed_BTHF = head_norm(x_BTHF, torch.ones(3, 8), torch.zeros(3, 8), eps=1e-6)
    >>> torch.allclose(normed_BTHF.square().mean(-1), torch.ones(2, 5, 3), atol=1e-4)
    True
    """
    # PyTorch's own kernels, which serve any device.
    run = implementation("head_norm", backend, {"reference": reference.head_norm, "triton": reference.head_norm})
    return run(x_BTHF, weight_HF, bias_HF, eps)
