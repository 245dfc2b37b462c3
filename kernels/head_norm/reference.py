"""Layer norm of each head's vector in plain PyTorch.

Legend: B batch, T tokens (any leading dims), H heads, F feature dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def head_norm(x_BTHF: Tensor, weight_HF: Tensor, bias_HF: Tensor, eps: float) -> Tensor:
    """The norm, scaled and shifted; see the package's function of this name."""
    wide = torch.promote_types(x_BTHF.dtype, torch.float32)
    normed_BTHF = functional.layer_norm(x_BTHF.to(wide), x_BTHF.shape[-1:], eps=eps)
    return torch.addcmul(bias_HF.to(wide), normed_BTHF, weight_HF.to(wide)).to(x_BTHF.dtype)
