"""One file per mixer, each the owner of its facts (facts.py), and the registry that finds them by letter."""

from based_megatron.model.mixers.base import Continuation, Mixer, MixerInputs, MixerSubmodules
from based_megatron.model.mixers.registry import MIXERS, has_states, layer_mixers, mixers_of, parameter_owner

__all__ = [
    "MIXERS",
    "Continuation",
    "Mixer",
    "MixerInputs",
    "MixerSubmodules",
    "has_states",
    "layer_mixers",
    "mixers_of",
    "parameter_owner",
]
