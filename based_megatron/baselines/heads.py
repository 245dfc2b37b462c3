"""What the baselines with heads have in common: a norm of each head, and a state that is a matrix for each head.

Legend: B sequences, T tokens, H heads of this tensor parallel rank, K key dim, V value head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.model.config import BasedConfig
from based_megatron.parallel.linear import sum_over_tensor_ranks


@dataclass(frozen=True)
class MatrixState:
    """The decoding state of a batch of sequences."""

    state_BHKV: Tensor
    """fp32, or fp64 under fp64 models."""

    @classmethod
    def zeros(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> "MatrixState":
        """The state [B, H, K, V] of empty sequences in a model of `dtype`."""
        return cls(torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device))


class GatedHeadNorm(nn.Module):
    """RMSNorm of each head, computed in fp32 or wider, times silu(gate) if there is one. One weight for all heads."""

    def __init__(self, config: BasedConfig, head_dim: int) -> None:
        super().__init__()
        self.eps = config.model.norm_eps
        self.weight = sum_over_tensor_ranks(nn.Parameter(torch.empty(head_dim, dtype=config.params_dtype)), config)

    def forward(self, x_BTHV: Tensor, gate_BTHV: Tensor | None = None) -> Tensor:
        """The normed and gated heads, in the dtype of the weight."""
        dtype = torch.promote_types(x_BTHV.dtype, torch.float32)
        normed = functional.rms_norm(x_BTHV.to(dtype), x_BTHV.shape[-1:], self.weight.to(dtype), self.eps)
        if gate_BTHV is not None:
            normed = normed * functional.silu(gate_BTHV.to(dtype))
        return normed.to(self.weight.dtype)
