"""One file per mixer, one line each in this registry of layer pattern letters."""

from based_megatron.model.mixers.attention import FullAttention, SlidingWindowAttention
from based_megatron.model.mixers.base import Continuation, Mixer, MixerInputs, MixerSubmodules
from based_megatron.model.mixers.gated_conv import GatedConv
from based_megatron.model.mixers.linear_attention import TaylorLinearAttention

MIXERS: dict[str, type[Mixer]] = {
    "c": GatedConv,
    "L": TaylorLinearAttention,
    "S": SlidingWindowAttention,
    "A": FullAttention,
}

__all__ = ["MIXERS", "Continuation", "Mixer", "MixerInputs", "MixerSubmodules"]
