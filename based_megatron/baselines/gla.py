"""Gated linear attention (GLA, arXiv 2312.06635): linear attention whose state decays by a gate for each key channel.

Legend: L tokens of this rank's slice, B sequences, D hidden size, H heads of this tensor parallel rank, K key dim, V value head dim.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.baselines import fla
from based_megatron.baselines.heads import DecayedAttention, check_widths
from based_megatron.baselines.operations.vector_decay import vector_decay, vector_decay_step
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers import Mixer
from based_megatron.model.mixers.base import split_heads
from based_megatron.model.mixers.facts import Shape
from based_megatron.parallel.linear import Projection, shard_parameter, sum_over_tensor_ranks

Width = Annotated[float, Range(above=0, at_most=16)]
Count = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class GLAOptions:
    """Settings of gated linear attention; its heads are model.num_heads."""

    expand_k: Width = 0.5
    """Width of queries and keys, in hidden sizes."""
    expand_v: Width = 1.0
    """Width of values and output gates, in hidden sizes."""
    gate_rank: Count = 16
    """Rank of the projection to the decays."""
    gate_temperature: Annotated[float, Range(at_least=1)] = 16.0
    """A decay is the sigmoid of its projection to the power of one over this: large values forget slowly."""


class LowRankDecay(nn.Module):
    """log(sigmoid(x down up + bias)) / temperature of this rank's key channels."""

    def __init__(self, config: BasedConfig, options: GLAOptions, channels: int) -> None:
        super().__init__()
        rank, dtype = options.gate_rank, config.params_dtype
        self.temperature = options.gate_temperature
        self.down = nn.Linear(config.hidden_size, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, channels, dtype=dtype)
        sum_over_tensor_ranks(self.down.weight, config)
        shard_parameter(self.up.weight, dim=0)
        shard_parameter(self.up.bias, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> log decays [..., H * K], fp32 or wider."""
        logits = self.up(self.down(x))
        return functional.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.temperature


class GatedLinearAttention(DecayedAttention):
    """S_t = diag(a_t) S_(t-1) + k_t v_t^T, o_t = q_t S_t / sqrt(K)."""

    letter, name = "G", "gla"
    Options = GLAOptions
    whole, one_token = staticmethod(vector_decay), staticmethod(vector_decay_step)
    whole_by_fla = staticmethod(fla.vector_decay)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decay = LowRankDecay(self.config, self.options(self.config.model), self.local_parts[1])

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """The decays read all tokens, as the fused projection does."""

        def project(projection: Projection) -> Any:
            return projection(), self.decay(projection.x_LBD)

        qkvg, decays = self.qkvg(x, body=project)[0]
        parts = (*qkvg.split(self.local_parts, dim=-1), decays)
        return tuple(split_heads(part, self.heads) for part in parts)

    @classmethod
    def check(cls, model: ModelConfig, tensor: int) -> None:
        check_widths(cls, model)

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D, rank, parts = model.hidden_size, cls.options(model).gate_rank, cls.parts(model)
        _, K, V, _ = parts
        return {
            "qkvg.weight": (sum(parts), D),
            "decay.down.weight": (rank, D),
            "decay.up.weight": (K, rank),
            "decay.up.bias": (K,),
            "norm.weight": (V // model.num_heads,),
            "out_proj.weight": (D, V),
        }

    @staticmethod
    def tensor_dim(name: str) -> int | None:
        return None if name == "decay.down.weight" else Mixer.tensor_dim(name)

    @classmethod
    def mixing_flops(cls, model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrence, for each element of the state: 1 to decay, 2 to add k v^T, 2 to read."""
        _, K, V, _ = cls.parts(model)
        return 5.0 * K * V / model.num_heads

    @staticmethod
    def parts(model: ModelConfig) -> tuple[int, int, int, int]:
        options = GatedLinearAttention.options(model)
        keys, values = round(model.hidden_size * options.expand_k), round(model.hidden_size * options.expand_v)
        return keys, keys, values, values
