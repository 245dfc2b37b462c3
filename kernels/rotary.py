"""Rotary position embedding, half-split (NeoX) layout.

Legend: B batch, T sequence, H heads, V head dim, R rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import implementation


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
    """
    rotated = int(head_dim * fraction)
    if not 0 <= rotated + rotated % 2 <= head_dim:
        raise ConfigError(
            f"model.rotary_fraction {fraction} rotates {rotated + rotated % 2} of {head_dim} head dims; lower it, or change "
            "model.num_heads"
        )
    run = implementation("rotary_tables", backend, {"reference": _reference_tables, "triton": _triton_tables})
    return run(positions_T, rotated, base, dtype)


def _reference_tables(positions_T: Tensor, rotated: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponents_R = torch.arange(0, rotated, 2, dtype=torch.float64, device=positions_T.device) / max(rotated, 1)
    angles_TR = positions_T.to(torch.float64).unsqueeze(-1) * base**-exponents_R
    return angles_TR.cos().to(dtype), angles_TR.sin().to(dtype)


def _triton_tables(positions_T: Tensor, rotated: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if rotated == 0:
        return _reference_tables(positions_T, rotated, base, dtype)
    from based_megatron.kernels import triton_rotary

    return triton_rotary.rotary_tables(positions_T, rotated, base, dtype)


def apply_rotary(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, backend: str = "reference") -> Tensor:
    """Rotate the pairs (x_r, x_{r+R}) of the first 2R dims of each head; the rest passes through.

    The tables are [T, R], or [B, T, R] where rows are at different positions. Computed in the wider of the two dtypes, returned
    in that of x. The Triton kernel computes in fp32 (fp64 runs in the reference), keeps the order of batch and tokens in memory,
    and gives the tables no gradient.
    """
    run = implementation("apply_rotary", backend, {"reference": _reference, "triton": _triton})
    return run(x_BTHV, cos_TR, sin_TR)


def _reference(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    rotated = 2 * cos_TR.shape[-1]
    cos_T1R, sin_T1R = cos_TR.unsqueeze(-2), sin_TR.unsqueeze(-2)
    first, second = x_BTHV[..., :rotated].chunk(2, dim=-1)
    turned = torch.cat([first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R], dim=-1)
    return torch.cat([turned.to(x_BTHV.dtype), x_BTHV[..., rotated:]], dim=-1)


def _triton(x_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    if torch.float64 in (x_BTHV.dtype, cos_TR.dtype):
        return _reference(x_BTHV, cos_TR, sin_TR)
    from based_megatron.kernels import triton_rotary  # Triton is there on machines with a GPU only.

    return triton_rotary.apply_rotary(x_BTHV, cos_TR, sin_TR)
