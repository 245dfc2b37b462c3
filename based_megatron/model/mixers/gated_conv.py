"""The short gated convolution: (silu(conv(u)) * gate) W_out, [u | gate] = x W_in (based.models.mixers.convolution.BaseConv)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.kernels.decode import ConvState, conv_step
from based_megatron.kernels.gated_conv import gated_conv_fused
from based_megatron.model.mixers.base import Continuation, Mixer, MixerInputs
from based_megatron.parallel.linear import shard_parameter
from based_megatron.parallel.sequence.exchange import with_halo
from based_megatron.parallel.sequence.plan import SequencePlan


class GatedConv(Mixer):
    """Depthwise causal convolution of a few taps, gated. The projections have biases, the convolution has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.config.model
        channels = model.hidden_size * model.conv_expand // 2
        self.in_proj = self.column((channels, channels), bias=True)
        weight = torch.empty(channels // self.group.size(), model.conv_kernel, dtype=self.config.params_dtype)
        self.conv_weight = shard_parameter(nn.Parameter(weight), dim=0)
        self.out_proj = self.row(channels, bias=True)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        y = conv_over_slices(self.in_proj(x)[0].transpose(0, 1), self.conv_weight, inputs.plan, self.config.backend)
        return self.out_proj(y.transpose(0, 1).contiguous())[0], None

    def zero_state(self, batch: int, device: torch.device) -> ConvState:
        channels, taps = self.conv_weight.shape
        return ConvState.zeros(batch, taps, channels, dtype=self.config.params_dtype, device=device)

    def prefill(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        projected = self.in_proj(x)[0]
        halo = None if where.is_start else state.inputs_BhD
        y = gated_conv_fused(projected, self.conv_weight, halo_BhD=halo, backend=self.config.backend)
        state.store(projected[..., : y.shape[-1]])
        return self.out_proj(y)[0]

    def step(self, x: Tensor, state: ConvState, where: Continuation) -> Tensor:
        u, gate = self.in_proj(x)[0].chunk(2, dim=-1)
        return self.out_proj(conv_step(u, gate, self.conv_weight, state, backend=self.config.backend))[0]


def conv_over_slices(projected_BLE: Tensor, weight_DK: Tensor, plan: SequencePlan, backend: str) -> Tensor:
    """The gated convolution of one slice of [u | gate], with the last K - 1 inputs of the slices before it."""
    (D, K), ids, halo = weight_DK.shape, plan.document_ids(weight_DK.shape[1] - 1), None
    if plan.axis.size > 1:
        # Every rank reads the exchange, the first its empty part: their backward passes must all take part in it.
        found, missing = plan.halo_rows(K - 1), K - 1 - plan.halo_rows(K - 1)
        halo = with_halo(projected_BLE[:, 1 - K :, :D], K - 1, plan)[:, :found]
        # Fewer rows than K - 1 exist in front of the second slice if slices are that short.
        halo = functional.pad(halo, (0, 0, missing, 0))
        ids = None if ids is None else functional.pad(ids, (missing, 0), value=-1)
    return gated_conv_fused(projected_BLE, weight_DK, halo_BhD=halo, key_document_ids_BS=ids, backend=backend)
