"""What all mixers share: Megatron's `self_attention` slot, and projections cut over the tensor parallel ranks.

Legend: L tokens of this rank's slice, N tokens of a halo in front of it, B sequences, D hidden size, H heads of this tensor
parallel rank, F feature dim, V value head dim.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from based_megatron.model.config import BasedConfig
from based_megatron.parallel.linear import column_linear, row_linear
from based_megatron.parallel.megatron import ColumnParallelLinear, MegatronModule, RowParallelLinear
from based_megatron.parallel.sequence.plan import SequencePlan


@dataclass(frozen=True)
class MixerSubmodules:
    """Classes of the projections, replaceable by others with Megatron's signature."""

    column: type = ColumnParallelLinear
    row: type = RowParallelLinear


@dataclass(frozen=True)
class MixerInputs:
    """What a mixer needs beside the activations, made once per micro batch."""

    plan: SequencePlan
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin of this slice's positions, [L, R] each; None where no layer of the model chunk rotates."""


class Mixer(MegatronModule):
    """Project in, mix over the sequence, project out. The constructor and forward are those of Megatron's attention slot."""

    rotates = False
    """Whether `inputs.rotary` is needed."""

    def __init__(
        self,
        config: BasedConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        pg_collection: Any,
        cp_comm_type: str | None = None,
    ) -> None:
        super().__init__(config)
        self.submodules, self.layer_number, self.group = submodules, layer_number, pg_collection.tp
        self.heads = config.model.num_heads // self.group.size()
        self.head_dim = config.model.hidden_size // config.model.num_heads

    def column(self, parts: tuple[int, ...], bias: bool = False) -> Any:
        """Projection from the hidden size to fused parts (unsharded sizes)."""
        return column_linear(self.config, parts, bias=bias, group=self.group, cls=self.submodules.column)

    def row(self, in_features: int, bias: bool = False) -> Any:
        """Projection back to the hidden size (unsharded input size)."""
        return row_linear(self.config, in_features, bias=bias, group=self.group, cls=self.submodules.row)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        """x: [L, B, D] normed, cut over tensor parallel ranks under sequence parallelism -> (the mix, alike; no loose bias)."""
        raise NotImplementedError


def heads_first_batch(x: Tensor, heads: int) -> Tensor:
    """Features [L, B, H * V] -> a view [B, L, H, V]."""
    return x.transpose(0, 1).unflatten(-1, (heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """[B, L, H, V] -> contiguous [L, B, H * V], as the projection back needs it."""
    return x.flatten(-2).transpose(0, 1).contiguous()
