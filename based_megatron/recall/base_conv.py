"""The first layer of the study's models, Zoology's BaseConv: y = x + conv(x) * (W x + b), a causal depthwise convolution of three taps.

The study alone uses it (arXiv 2312.04927, section 5): the gated convolution of the product (letter c) has two projections and a silu.

Legend: B sequences, L tokens, D hidden size, K taps.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.baselines.operations.short_convolution import few_taps
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
        mixed_BLD = self._mixed(x.transpose(0, 1), document_ids_BT=inputs.plan.document_ids())
        return mixed_BLD.transpose(0, 1), None

    def prefill(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        mixed_BLD = self._mixed(x, halo_BhC=state.inputs_BhD)
        state.store(x)
        return mixed_BLD

    def step(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        return self.prefill(x[:, None], state, where)[:, 0]

    def _mixed(self, x_BLD: Tensor, **options: Tensor | None) -> Tensor:
        """The mix of L tokens; the options are those of `few_taps`."""
        convolved_BLD = few_taps(x_BLD, self.conv_weight, self.conv_bias, **options)
        return x_BLD + convolved_BLD.to(x_BLD.dtype) * self.gate(x_BLD)[0]

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
