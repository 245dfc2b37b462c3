"""RMSNorm of the fp32 residual stream."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.model.config import BasedConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in the residual's dtype, returned in the weight's."""

    def __init__(self, config: BasedConfig) -> None:
        super().__init__()
        self.eps = config.model.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        # Under Megatron's sequence parallelism each rank sees some tokens: gradients are summed over the tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] in the residual's dtype -> [..., D] in the weight's dtype."""
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
