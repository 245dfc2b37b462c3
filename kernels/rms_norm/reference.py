"""Addition and RMSNorm in plain PyTorch.

Legend: T tokens (any leading dims), D hidden size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.fp8 import quantised_rows
from based_megatron.kernels.fp8.tokens import Fp8Tokens, stand_in


def add_rms_norm(residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm; see the package's function of this name."""
    sum_TD, normed_TD = _sum_and_norm(residual_TD, update_TD, weight_D, eps)
    return sum_TD, normed_TD.to(weight_D.dtype)


def add_rms_norm_rows(
    residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Fp8Tokens]:
    """The sum and its norm in e4m3; see the package's function of this name."""
    sum_TD, normed_TD = _sum_and_norm(residual_TD, update_TD, weight_D, eps)
    return sum_TD, Fp8Tokens(stand_in(normed_TD.to(weight_D.dtype)), quantised_rows(normed_TD.detach().flatten(0, -2)))


def _sum_and_norm(residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = residual_TD if update_TD is None else residual_TD + update_TD
    return sum_TD, functional.rms_norm(sum_TD, weight_D.shape, weight_D.to(sum_TD.dtype), eps)
