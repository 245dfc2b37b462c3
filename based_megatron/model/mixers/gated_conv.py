"""The short gated convolution: (silu(conv(u)) * gate) W_out, [u | gate] = x W_in (based.models.mixers.convolution.BaseConv).

Legend: B sequences, L tokens of this rank's slice, D hidden size, C channels, K taps, h = K - 1 halo inputs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from based_megatron.config import ModelConfig
from based_megatron.errors import CheckpointError
from based_megatron.kernels.decode import ConvState, conv_step
from based_megatron.kernels.exchange import Halo
from based_megatron.kernels.gated_conv import gated_conv_fused, gated_conv_over_slices
from based_megatron.model.mixers.base import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.facts import SavedPiece, Shape
from based_megatron.parallel.fp8 import takes_fp8
from based_megatron.parallel.linear import Projection, shard_parameter
from based_megatron.parallel.sequence.carried import CarriedForm
from based_megatron.parallel.sequence.halos import HaloExchange
from based_megatron.parallel.sequence.plan import SequencePlan

CONV = "conv"
RELEASED_DEFAULT_KERNEL = 3
"""The released key is a misspelt `kernel_sizes`, which the released code ignores."""


class GatedConv(Mixer):
    """Depthwise causal convolution of a few taps, gated. The projections have biases, the convolution has none."""

    letter, name, hf_name = "c", "gated_conv", "conv"
    slices = carries = True
    released_slot, released_target = "mixer", "based.models.mixers.convolution.BaseConv"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.config.model
        channels = _channels(model)
        self.in_proj = self.column((channels, channels), bias=True)
        weight = torch.empty(channels // self.group.size(), model.conv_kernel, dtype=self.config.params_dtype)
        self.conv_weight = shard_parameter(nn.Parameter(weight), dim=0)
        self.out_proj = self.row(channels, bias=True)

    @property
    def takes_fp8(self) -> bool:
        return takes_fp8(self.in_proj)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        plan, weight = inputs.plan, self.conv_weight
        if plan.is_whole or weight.shape[1] == 1:
            projected, ids, backend = self.in_proj(x)[0].transpose(0, 1), plan.document_ids(), self.config.backend
            y = gated_conv_fused(projected, weight, key_document_ids_BS=ids, backend=backend)
        else:
            y = self.in_proj(x, body=lambda project: self._convolve_slice(project, plan))[0]
        return self.out_proj(y.transpose(0, 1).contiguous())[0], None

    def _convolve_slice(self, project: Projection, plan: SequencePlan) -> Tensor:
        """Mix a slice whose first outputs read inputs of earlier slices.

        Boundary rows are projected first, and travel while the other rows are projected.
        """
        channels, taps = self.conv_weight.shape
        exchange = HaloExchange(plan, CONV, self.layer_number, taps - 1, keep=self.keeps_received)
        arriving = exchange.start(lambda: project.last_tokens(exchange.boundary_rows, slice(channels)).transpose(0, 1))
        return gated_conv_over_slices(
            project().transpose(0, 1),
            self.conv_weight,
            Halo(arriving, exchange),
            key_document_ids_BS=plan.document_ids(taps - 1),
            backend=self.config.backend,
        )

    @staticmethod
    def carried_forms(model: ModelConfig, dtype: torch.dtype) -> dict[str, CarriedForm]:
        rows = model.conv_kernel - 1
        return {CONV: CarriedForm((rows, _channels(model)), cut_dim=1, dtype=dtype)} if rows else {}

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> ConvState:
        return ConvState.zeros(batch, model.conv_kernel, _channels(model), dtype=dtype, device=device)

    def prefill(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        projected = self.in_proj(x)[0]
        halo = None if where.is_start else state.inputs_BhD
        y = gated_conv_fused(projected, self.conv_weight, halo_BhD=halo, backend=self.config.backend)
        state.store(projected[..., : y.shape[-1]])
        return self.out_proj(y)[0]

    def step(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        u, gate = self.in_proj(x)[0].chunk(2, dim=-1)
        return self.out_proj(conv_step(u, gate, self.conv_weight, state, backend=self.config.backend))[0]

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D, C = model.hidden_size, _channels(model)
        return {
            "in_proj.weight": (2 * C, D),
            "in_proj.bias": (2 * C,),
            "conv_weight": (C, model.conv_kernel),
            "out_proj.weight": (D, C),
            "out_proj.bias": (D,),
        }

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """[u | gate] and y."""
        return piece.numbers(3 * _channels(model))

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the convolution: 2 for each tap and channel."""
        return 2.0 * model.conv_kernel * _channels(model)

    @staticmethod
    def initial(name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: taps U(-1 / sqrt(K), 1 / sqrt(K)); the projections as for other mixers."""
        if name != "conv_weight":
            return Mixer.initial(name, shape, model, generator)
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    @classmethod
    def released_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        if name == "conv_weight":
            return {"conv.conv.weight": (_channels(model), 1, model.conv_kernel)}
        return super().released_parts(model, name)

    @staticmethod
    def released_settings(model: ModelConfig) -> dict[str, Any]:
        return {"l_max": 2048, "use_bias": True, "expand_proj": model.conv_expand, "kernel_size": model.conv_kernel}

    @staticmethod
    def read_released(section: dict[str, Any]) -> dict[str, Any]:
        if not section.get("use_bias", True):
            raise CheckpointError("config.json has mixer.use_bias false, but only true is known")
        kernel = section.get("kernel_size", RELEASED_DEFAULT_KERNEL)
        return {"conv_kernel": kernel, "conv_expand": section["expand_proj"]}


def _channels(model: ModelConfig) -> int:
    """Number of channels C that are convolved; the gate has as many."""
    return model.hidden_size * model.conv_expand // 2
