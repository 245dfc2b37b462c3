"""One layer: a mixer and a gated MLP, each behind a norm, on an fp32 residual stream."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers import MIXERS, MixerInputs, MixerSubmodules
from based_megatron.model.mlp import SwiGLU
from based_megatron.model.norm import RMSNorm
from based_megatron.parallel.megatron import MegatronModule


class Block(MegatronModule):
    """residual += mixer(norm(residual)); residual += mlp(norm(residual))."""

    def __init__(self, config: BasedConfig, letter: str, layer_number: int, pg_collection: Any) -> None:
        super().__init__(config)
        self.mixer_norm = RMSNorm(config)
        self.mixer = MIXERS[letter](config, MixerSubmodules(), layer_number, pg_collection)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, pg_collection.tp)

    def forward(self, residual: Tensor, inputs: MixerInputs) -> Tensor:
        """residual: [L, B, D] fp32, cut over tensor parallel ranks under sequence parallelism -> alike."""
        recompute = self.config.recompute if torch.is_grad_enabled() else "none"
        if recompute == "full":
            return _recomputed(self._layer, residual, inputs)
        mixed = _recomputed(self._mix, residual, inputs) if recompute == "mixer" else self._mix(residual, inputs)
        return self._feed_forward(residual + mixed)

    def _layer(self, residual: Tensor, inputs: MixerInputs) -> Tensor:
        return self._feed_forward(residual + self._mix(residual, inputs))

    def _mix(self, residual: Tensor, inputs: MixerInputs) -> Tensor:
        return self.mixer(self.mixer_norm(residual), inputs=inputs)[0]

    def _feed_forward(self, residual: Tensor) -> Tensor:
        return residual + self.mlp(self.mlp_norm(residual))


def _recomputed(function: Any, residual: Tensor, inputs: MixerInputs) -> Tensor:
    # The reentrant form: the other compares tensor metadata, which ZeRO-3 changes when it frees parameters.
    return checkpoint(function, residual, inputs, use_reentrant=True, preserve_rng_state=False)
