"""Addition and RMSNorm in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def add_rms_norm(residual_MD: Tensor, update_MD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm; see the package's function of the same name."""
    sum_MD = residual_MD if update_MD is None else residual_MD + update_MD
    normed_MD = functional.rms_norm(sum_MD, weight_D.shape, weight_D.to(sum_MD.dtype), eps)
    return sum_MD, normed_MD.to(weight_D.dtype)
