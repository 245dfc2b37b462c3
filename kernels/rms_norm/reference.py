"""Addition and RMSNorm in plain PyTorch.

Legend: T tokens (any leading dims), D hidden size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def add_rms_norm(residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm; see the package's function of this name."""
    sum_TD = residual_TD if update_TD is None else residual_TD + update_TD
    normed_TD = functional.rms_norm(sum_TD, weight_D.shape, weight_D.to(sum_TD.dtype), eps)
    return sum_TD, normed_TD.to(weight_D.dtype)
