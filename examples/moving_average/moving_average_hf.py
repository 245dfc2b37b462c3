"""The moving average in a Hugging Face export, which gets a copy of this file: it needs torch and transformers alone.

Legend: B sequences, T tokens of this call, S tokens with those of the cache, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


class MovingAverageForExport(nn.Module):
    """out_proj(h), h_t = a h_{t-1} + u_t."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.decay_logit = nn.Parameter(torch.zeros(config.hidden_size))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, mask_BS: Tensor | None, cache: Cache | None, **_: Any) -> Tensor:
        u_BTD = self.in_proj(x_BTD)
        if mask_BS is not None:
            u_BTD = u_BTD * mask_BS[:, -u_BTD.shape[1] :, None]
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        keep_D, sums = self.decay_logit.to(wide).sigmoid(), []
        layer: Any = None if cache is None else cache.layers[self.layer_idx]
        sum_BD = None if layer is None else layer.recurrent_states[0]
        for u_BD in u_BTD.to(wide).unbind(1):
            sum_BD = u_BD if sum_BD is None else keep_D * sum_BD + u_BD
            sums.append(sum_BD)
        if cache is not None and sum_BD is not None:
            cache.update_recurrent_state(sum_BD, self.layer_idx)
        return self.out_proj(torch.stack(sums, dim=1).to(x_BTD.dtype))
