"""One layer: a mixer and a gated MLP, each behind a norm, on an fp32 residual stream."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs, MixerSubmodules
from based_megatron.model.mlp import SwiGLU
from based_megatron.model.norm import RMSNorm
from based_megatron.parallel.fp8 import takes_fp8
from based_megatron.parallel.megatron import MegatronModule


class Block(MegatronModule):
    """residual += mixer(norm(residual)); residual += mlp(norm(residual))."""

    def __init__(self, config: BasedConfig, mixer: type[Mixer], layer_number: int, pg_collection: Any) -> None:
        super().__init__(config)
        self.mixer_norm = RMSNorm(config)
        self.mixer = mixer(config, MixerSubmodules(), layer_number, pg_collection)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, pg_collection.tp)

    def hand_on_fp8(self) -> None:
        """Have the norms cast to e4m3 where every layer that reads them takes that."""
        self.mlp_norm.casts_to_fp8 = takes_fp8(self.mlp.fc1)
        # Recomputation follows gradients through tensors alone.
        self.mixer_norm.casts_to_fp8 = self.config.recompute != "mixer" and self.mixer.takes_fp8

    def forward(self, residual: Tensor, update: Tensor | None, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        """Run the layer: (fp32 residual, update that the layer before adds to it) -> the same two for the next layer.

        Both are [L, B, D], cut over the tensor parallel ranks under sequence parallelism.

        The addition is left to the next norm, which reads both anyway; update None adds nothing.
        """
        recompute = self.config.recompute if torch.is_grad_enabled() else "none"
        if recompute == "full":
            return _recomputed(self._layer, residual if update is None else residual + update, inputs)
        residual, x = self._enter(residual, update, inputs)
        mixed = _recomputed(self._mix, x, inputs) if recompute == "mixer" else self._mix(x, inputs)
        return self._feed_forward(residual, mixed)

    def _layer(self, residual: Tensor, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        residual, x = self._enter(residual, None, inputs)
        return self._feed_forward(residual, self._mix(x, inputs))

    def _enter(self, residual: Tensor, update: Tensor | None, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        residual, x = self.mixer_norm(residual, update)
        inputs.watch(f"residual_rms/{self.mixer.layer_name}", lambda: _rms(residual), "rms", count=residual.numel())
        return residual, x

    def _mix(self, x: Tensor, inputs: MixerInputs) -> Tensor:
        return self.mixer(x, inputs=inputs)[0]

    def _feed_forward(self, residual: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        residual, x = self.mlp_norm(residual, mixed)
        return residual, self.mlp(x)

    def decode(self, residual: Tensor, update: Tensor | None, state: Any, where: Continuation) -> tuple[Tensor, Tensor]:
        """Forward of decoding: a piece of each prompt, [B, L, D], or one token of each, [B, D]."""
        residual, x = self.mixer_norm(residual, update)
        mix = self.mixer.step if residual.ndim == 2 else self.mixer.prefill
        residual, x = self.mlp_norm(residual, mix(x, state, where))
        return residual, self.mlp(x)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of all elements, fp32."""
    return torch.linalg.vector_norm(x, dtype=torch.float32) / x.numel() ** 0.5


def _recomputed(function: Any, x: Tensor, inputs: MixerInputs) -> Any:
    # The reentrant form: the other compares tensor metadata, which ZeRO-3 changes when it frees parameters.
    return checkpoint(function, x, inputs, use_reentrant=True, preserve_rng_state=False)
