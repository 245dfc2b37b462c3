"""RWKV-4 (arXiv 2305.13048): averages of values weighted by e^key, which fade with a constant decay of each channel.

The feed-forward part of the published model is not here: it is the block's, as for all mixers.

Legend: B sequences, T tokens, L tokens of this rank's slice, D hidden size, X = 2, the weighted values and the weights.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.baselines.operations.wkv import wkv
from based_megatron.baselines.token_shift import shifted, tokens_before
from based_megatron.config import ModelConfig
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.facts import Shape

MIXES = ("k", "v", "r")
"""Rows of `token_mix`."""


@dataclass(frozen=True)
class RWKV4State:
    """The decoding state of a batch of sequences."""

    sums_BDX: Tensor
    """Faded sums of weighted values and of weights, relative to the largest weight; fp32, or fp64 under fp64 models."""
    exponent_BD: Tensor
    """Logarithm of the largest weight, in the dtype of the sums."""
    last_BD: Tensor
    """The last input, in the model's dtype."""


class RWKV4(Mixer):
    """out_proj(sigmoid(r) wkv(k, v)), where r, k and v are projections of a token mixed with the one before."""

    letter, name = "V", "rwkv4"
    shards = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        D, dtype = self.config.model.hidden_size, self.config.params_dtype
        self.token_mix = nn.Parameter(torch.empty(len(MIXES), D, dtype=dtype))
        self.decay, self.bonus = (nn.Parameter(torch.empty(D, dtype=dtype)) for _ in range(2))
        self.k_proj, self.v_proj, self.r_proj = (self.column((D,)) for _ in range(3))
        self.out_proj = self.row(D)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        x_BLD, ids = x.transpose(0, 1), inputs.plan.document_ids()
        k, v, r = self._projected(x_BLD, tokens_before(x_BLD, document_ids_BT=ids))
        y_BLD, _state = wkv(k, v, self.bonus, self._log_decay(), document_ids_BT=ids)
        return self.out_proj((r.sigmoid() * y_BLD).transpose(0, 1).contiguous())[0], None

    def prefill(self, x: Tensor, state: RWKV4State, where: Continuation) -> Tensor:
        k, v, r = self._projected(x, tokens_before(x, last_BD=state.last_BD))
        before = (state.exponent_BD, state.sums_BDX)
        y_BLD, (exponent_BD, sums_BDX) = wkv(k, v, self.bonus, self._log_decay(), initial_state=before)
        state.exponent_BD.copy_(exponent_BD)
        state.sums_BDX.copy_(sums_BDX)
        state.last_BD.copy_(x[:, -1])
        return self.out_proj(r.sigmoid() * y_BLD)[0]

    def step(self, x: Tensor, state: RWKV4State, where: Continuation) -> Tensor:
        return self.prefill(x[:, None], state, where)[:, 0]

    def _projected(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_k, of_v, of_r = shifted(x, before, self.token_mix)
        return self.k_proj(of_k)[0], self.v_proj(of_v)[0], self.r_proj(of_r)[0]

    def _log_decay(self) -> Tensor:
        return -self.decay.to(torch.promote_types(self.decay.dtype, torch.float32)).exp()

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        projections = {f"{name}.weight": (D, D) for name in ("k_proj", "v_proj", "r_proj", "out_proj")}
        return {"token_mix": (len(MIXES), D), "decay": (D,), "bonus": (D,), **projections}

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrence, for each channel: 2 each to write and to read both sums."""
        return 8.0 * model.hidden_size

    @classmethod
    def initial(cls, name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32, as published for the layer in the middle of a model."""
        D = model.hidden_size
        place_D = torch.arange(D) / D
        if name == "token_mix":
            return torch.stack([place_D**0.5, place_D**0.5 + 0.15, place_D**0.25])
        if name == "decay":
            return -5 + 8 * (torch.arange(D) / max(D - 1, 1)) ** (0.7 + 1.3 / 2)
        if name == "bonus":
            return math.log(0.3) + ((torch.arange(D) + 1) % 3 - 1) / 2
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        """True for matrices alone."""
        return name.endswith(".weight")

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> RWKV4State:
        D, wide = model.hidden_size, torch.promote_types(dtype, torch.float32)
        return RWKV4State(
            torch.zeros(batch, D, 2, dtype=wide, device=device),
            torch.zeros(batch, D, dtype=wide, device=device),
            torch.zeros(batch, D, dtype=dtype, device=device),
        )
