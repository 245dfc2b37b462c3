"""RMSNorm of the fp32 residual stream, and layer norm of heads.

Legend: D hidden size, H heads of this tensor parallel rank, F feature dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.kernels.head_norm import head_norm
from based_megatron.kernels.rms_norm import add_rms_norm, add_rms_norm_rows
from based_megatron.model.config import BasedConfig
from based_megatron.parallel.linear import shard_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in the residual's dtype, returned in the weight's."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.config = config
        self.casts_to_fp8 = False
        """Whether the norm is returned in e4m3, for layers that take it so."""
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        # Under Megatron's sequence parallelism each rank sees some tokens: gradients are summed over the tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, residual: Tensor, update: Tensor | None = None) -> tuple[Tensor, Any]:
        """Add the update to the residual, [..., D] each, and normalise: (sum in the residual's dtype, its norm in the weight's).

        The norm is an `Fp8Tokens` if the layers after it take that.
        """
        norm = add_rms_norm_rows if self.casts_to_fp8 else add_rms_norm
        return norm(residual, update, self.weight, self.config.model.norm_eps, backend=self.config.backend)


class HeadNorm(nn.Module):
    """Layer norm of the vector of each head, with a scale and a shift of its own; heads are cut over tensor parallel ranks."""

    def __init__(self, config: BasedConfig, heads: int, size: int, eps: float = 1e-5) -> None:
        """heads: those of this tensor parallel rank; size: numbers of a head's vector."""
        super().__init__()
        self.heads, self.eps, self.backend = heads, eps, config.backend
        scale, shift = (
            torch.ones(heads * size, dtype=config.params_dtype),
            torch.zeros(heads * size, dtype=config.params_dtype),
        )
        self.weight, self.bias = (shard_parameter(nn.Parameter(x), dim=0) for x in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, F] -> its norm, alike."""
        weight_HF, bias_HF = (parameter.view(self.heads, -1) for parameter in (self.weight, self.bias))
        return head_norm(x, weight_HF, bias_HF, self.eps, backend=self.backend)
