"""RMSNorm of the fp32 residual stream."""

import torch
from torch import Tensor, nn

from based_megatron.kernels.rms_norm import add_rms_norm
from based_megatron.model.config import BasedConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in the residual's dtype, returned in the weight's."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        # Under Megatron's sequence parallelism each rank sees some tokens: gradients are summed over the tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, residual: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add the update to the residual, [..., D] each, and normalise: (sum in the residual's dtype, its norm in the weight's)."""
        return add_rms_norm(residual, update, self.weight, self.config.model.norm_eps, backend=self.config.backend)
