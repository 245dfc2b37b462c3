"""A mixer in a package of its own: a decaying sum over the past, h_t = a h_{t-1} + u_t with a learnt a for each channel.

Legend: L tokens, B sequences, D hidden size, C channels of this tensor parallel rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from moving_average_hf import MovingAverageForExport
from torch import Tensor, nn

from based_megatron.config import ModelConfig
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.facts import Shape
from based_megatron.parallel.linear import shard_parameter


@dataclass(frozen=True)
class AverageState:
    """The decoding state of a batch of sequences."""

    sum_BC: Tensor
    """The sum so far, fp32 or wider."""


class MovingAverage(Mixer):
    """out_proj(h). Channels are independent: tensor parallel ranks exchange nothing between the projections."""

    letter, name = "m", "moving_average"
    hf_name, hf_cache_layer = "moving_average", "linear_attention"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.config.model.hidden_size
        self.in_proj, self.out_proj = self.column((width,)), self.row(width)
        decay = torch.empty(width // self.group.size(), dtype=self.config.params_dtype)
        self.decay_logit = shard_parameter(nn.Parameter(decay), dim=0)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        u_LBC, ids_BL = self.in_proj(x)[0], inputs.plan.document_ids()
        sums_LBC, _state = self._sums(u_LBC, torch.zeros_like(u_LBC[0]), ids_BL)
        return self.out_proj(sums_LBC)[0], None

    def prefill(self, x: Tensor, state: AverageState, where: Continuation) -> Tensor:
        sums_LBC, last_BC = self._sums(self.in_proj(x)[0].transpose(0, 1), state.sum_BC)
        state.sum_BC.copy_(last_BC)
        return self.out_proj(sums_LBC.transpose(0, 1))[0]

    def step(self, x: Tensor, state: AverageState, where: Continuation) -> Tensor:
        sums_LBC, last_BC = self._sums(self.in_proj(x)[0][None], state.sum_BC)
        state.sum_BC.copy_(last_BC)
        return self.out_proj(sums_LBC[0])[0]

    def _sums(self, u_LBC: Tensor, sum_BC: Tensor, ids_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum at each token in the dtype of u, and the last one in fp32 or wider; documents start from zero."""
        wide = torch.promote_types(u_LBC.dtype, torch.float32)
        keep_C, sum_BC, sums = self.decay_logit.to(wide).sigmoid(), sum_BC.to(wide), []
        for t, u_BC in enumerate(u_LBC.to(wide)):
            if ids_BL is not None and t > 0:
                sum_BC = sum_BC * (ids_BL[:, t] == ids_BL[:, t - 1])[:, None]
            sum_BC = keep_C * sum_BC + u_BC
            sums.append(sum_BC)
        return torch.stack(sums).to(u_LBC.dtype), sum_BC

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        return {"in_proj.weight": (D, D), "decay_logit": (D,), "out_proj.weight": (D, D)}

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token: a multiply-add for each channel."""
        return 2.0 * model.hidden_size

    @staticmethod
    def initial(name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values: sums that fade over one to twenty tokens."""
        if name == "decay_logit":
            return torch.empty(shape).uniform_(0, 3, generator=generator)
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        return name != "decay_logit"

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> AverageState:
        wide = torch.promote_types(dtype, torch.float32)
        return AverageState(torch.zeros(batch, model.hidden_size, dtype=wide, device=device))

    @staticmethod
    def hf_class() -> type[nn.Module]:
        return MovingAverageForExport
