"""Rotary position embedding in plain PyTorch.

Legend: B batch, T tokens, H heads, V head dim, R rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions_T: Tensor, rotated: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R] for `rotated` dims; see the package's function of this name."""
    exponents_R = torch.arange(0, rotated, 2, dtype=torch.float64, device=positions_T.device) / max(rotated, 1)
    angles_TR = positions_T.to(torch.float64).unsqueeze(-1) * base**-exponents_R
    return angles_TR.cos().to(dtype), angles_TR.sin().to(dtype)


def apply_rotary(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The rotated heads; see the package's function of this name."""
    rotated_dims = 2 * cos_TR.shape[-1]
    cos_T1R, sin_T1R = cos_TR.unsqueeze(-2), sin_TR.unsqueeze(-2)
    first, second = x_BTHV[..., :rotated_dims].chunk(2, dim=-1)
    rotated = torch.cat([first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R], dim=-1)
    return torch.cat([rotated.to(x_BTHV.dtype), x_BTHV[..., rotated_dims:]], dim=-1)
