"""The first layer of the study's models, Zoology's BaseConv: y = x + conv(x) * (W x + b), a causal depthwise convolution of three taps.

The study alone uses it (arXiv 2312.04927, section 5): the gated convolution of the product (letter c) has two projections and a silu.

Legend: B sequences, L tokens, D hidden size, K taps, h = K - 1 inputs in front, S = h + L.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.config import ModelConfig
from based_megatron.kernels.decode import ConvState
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.facts import Shape

TAPS = 3


class BaseConv(Mixer):
    """A gated convolution without a projection back: there is nothing to cut over tensor parallel ranks."""

    letter, name = "b", "base_conv"
    shards = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width, dtype = self.config.model.hidden_size, self.config.params_dtype
        self.gate = self.column((width,), bias=True)
        self.conv_weight = nn.Parameter(torch.empty(width, TAPS, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        return self._mixed(x, functional.pad(x, (0, 0, 0, 0, TAPS - 1, 0)), inputs.plan.document_ids()), None

    def prefill(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        x_SBD = torch.cat([state.inputs_BhD, x], dim=1).transpose(0, 1)
        state.store(x)
        return self._mixed(x.transpose(0, 1), x_SBD).transpose(0, 1)

    def step(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        return self.prefill(x[:, None], state, where)[:, 0]

    def _mixed(self, x_LBD: Tensor, x_SBD: Tensor, ids_BL: Tensor | None = None) -> Tensor:
        """The mix of L tokens, given these and the h before them; a tap sees its token's document alone."""
        convolved_LBD: Tensor = self.conv_bias
        for tap in range(TAPS):
            seen = slice(tap, tap + len(x_LBD))
            term_LBD = x_SBD[seen] * self.conv_weight[:, tap]
            if ids_BL is not None:
                seen_ids_BL = functional.pad(ids_BL, (TAPS - 1, 0), value=-1)[:, seen]
                term_LBD = term_LBD * seen_ids_BL.eq(ids_BL).t()[..., None]
            convolved_LBD = convolved_LBD + term_LBD
        return x_LBD + convolved_LBD * self.gate(x_LBD)[0]

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> ConvState:
        return ConvState.zeros(batch, TAPS, model.hidden_size, dtype=dtype, device=device)

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        return {"gate.weight": (D, D), "gate.bias": (D,), "conv_weight": (D, TAPS), "conv_bias": (D,)}

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the convolution: 2 for each tap and channel."""
        return 2.0 * TAPS * model.hidden_size

    @staticmethod
    def initial(name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: taps and their bias U(-1 / sqrt(K), 1 / sqrt(K)), PyTorch's; the projection as for other mixers."""
        if name not in ("conv_weight", "conv_bias"):
            return Mixer.initial(name, shape, model, generator)
        bound = 1 / math.sqrt(TAPS)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
