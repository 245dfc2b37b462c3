"""The short gated convolution: (silu(conv(u)) * gate) W_out, [u | gate] = x W_in (based.models.mixers.convolution.BaseConv)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.kernels.gated_conv import gated_conv
from based_megatron.model.mixers.base import Mixer, MixerInputs
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
        u, gate = self.in_proj(x)[0].transpose(0, 1).chunk(2, dim=-1)
        y = conv_over_slices(u, gate, self.conv_weight, inputs.plan, self.config.backend)
        return self.out_proj(y.transpose(0, 1).contiguous())[0], None


def conv_over_slices(u_BLD: Tensor, gate_BLD: Tensor, weight_DK: Tensor, plan: SequencePlan, backend: str) -> Tensor:
    """The gated convolution of one slice, with the last K - 1 inputs of the slices before it."""
    rows, found = weight_DK.shape[1] - 1, plan.halo_rows(weight_DK.shape[1] - 1)
    # Every rank reads its inputs from the exchange, with or without a halo: their backward passes must all take part in it.
    extended = with_halo(u_BLD, rows, plan)
    u_BLD, ids = extended[:, found:], plan.document_ids(rows)
    if not found:
        return gated_conv(u_BLD, gate_BLD, weight_DK, key_document_ids_BS=ids, backend=backend)
    # Fewer rows than K - 1 exist in front of the second slice if slices are that short.
    halo = functional.pad(extended[:, :found], (0, 0, rows - found, 0))
    if ids is not None:
        ids = functional.pad(ids, (rows - found, 0), value=-1)
    return gated_conv(u_BLD, gate_BLD, weight_DK, halo_BhD=halo, key_document_ids_BS=ids, backend=backend)
