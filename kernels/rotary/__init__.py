"""Rotary position embedding, half-split (NeoX) layout.

Legend: B batch, T tokens, H heads, V head dim, R rotated pairs.

    y_r = x_r cos(a_r) - x_{r+R} sin(a_r),   y_{r+R} = x_{r+R} cos(a_r) + x_r sin(a_r),   a_r = position base^(-2r / d)
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import implementation
from based_megatron.kernels.rotary import reference

__all__ = ["apply_rotary", "rotary_tables"]


def rotary_tables(
    positions_T: Tensor,
    head_dim: int,
    fraction: float,
    base: float,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R] of the rotation angles at integer positions.

    R is half of d = int(head_dim * fraction), rounded up: an odd d rotates one dim more, with the frequencies base^(-2r / d) of the
    odd number, as flash-attn does in the published 1B transformer (35 of 70 dims). Angles are computed in fp64: at position
    1e6 fp32 ones would be off by 0.03. Leading dims of positions_T are kept. The Triton kernel is one launch, where PyTorch has ten.
    Raises: ConfigError when the rotated part is longer than the head.

    >>> cos_TR, sin_TR = rotary_tables(torch.arange(5), head_dim=64, fraction=0.5, base=10_000.0)
    >>> cos_TR.shape, cos_TR[0, 0].item(), sin_TR[0, 0].item()
    (torch.Size([5, 16]), 1.0, 0.0)
    """
    rotated = int(head_dim * fraction)
    if not 0 <= rotated + rotated % 2 <= head_dim:
        raise ConfigError(
            f"model.rotary_fraction {fraction} rotates {rotated + rotated % 2} of {head_dim} head dims; lower it, or change "
            "model.num_heads"
        )
    run = implementation("rotary_tables", backend, {"reference": reference.rotary_tables, "triton": _triton_tables})
    return run(positions_T, rotated, base, dtype)


def apply_rotary(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, backend: str = "reference") -> Tensor:
    """Heads whose pairs (x_r, x_{r+R}) in the first 2R dims are rotated; the other dims stay as they are.

    The tables are [T, R], or [B, T, R] where rows are at different positions. Computed in the wider of the two dtypes, returned
    in that of x. The Triton kernel computes in fp32 (fp64 runs in the reference), keeps the order of batch and tokens in memory,
    and gives the tables no gradient.

    >>> cos_TR, sin_TR = rotary_tables(torch.arange(5), head_dim=8, fraction=0.5, base=10_000.0)
    >>> x_BTHV = torch.randn(2, 5, 3, 8)
    >>> y_BTHV = apply_rotary(x_BTHV, cos_TR, sin_TR)
    >>> torch.equal(y_BTHV[:, 0], x_BTHV[:, 0]), torch.equal(y_BTHV[..., 4:], x_BTHV[..., 4:])
    (True, True)
    """
    run = implementation("apply_rotary", backend, {"reference": reference.apply_rotary, "triton": _triton})
    return run(x_BTHV, cos_TR, sin_TR)


def _triton_tables(positions_T: Tensor, rotated: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if rotated == 0:
        return reference.rotary_tables(positions_T, rotated, base, dtype)
    from based_megatron.kernels.rotary import triton_rotary

    return triton_rotary.rotary_tables(positions_T, rotated, base, dtype)


def _triton(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    if torch.float64 in (x_BTHV.dtype, cos_TR.dtype):
        return reference.apply_rotary(x_BTHV, cos_TR, sin_TR)
    from based_megatron.kernels.rotary import triton_rotary  # Triton is there on machines with a GPU only.

    return triton_rotary.apply_rotary(x_BTHV, cos_TR, sin_TR)
