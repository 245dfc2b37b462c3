"""The base class of mixers: Megatron's `self_attention` slot, and projections cut over the tensor parallel ranks.

Legend: L tokens of this rank's slice, N rows of a halo in front of it, S = N + L keys, B sequences, D hidden size, H heads of this tensor
parallel rank, F feature dim, V value head dim. Decoding keeps sequences apart: [B, L, D], and [B, D] for one token.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers.facts import MixerFacts
from based_megatron.model.recorder import SILENT, Recorder
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
    """What a mixer needs besides the activations, made once per micro batch."""

    plan: SequencePlan
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin of this slice's positions, [L, R] each; None where no layer of the model chunk rotates."""
    recorder: Recorder = SILENT
    """Takes what layers record of themselves."""

    def watch(
        self,
        name: str,
        value: Callable[[], Tensor],
        reduce: Literal["mean", "rms", "max", "min"] = "mean",
        count: float = 1.0,
    ) -> None:
        """Record a metric of this pass: `value` gives a scalar on the device, and is called in steps that are logged only.

        count: how many items it is the mean or the RMS of, where passes and ranks differ.
        Under recomputation the pass with gradients counts, and evaluations never do.
        """
        if self.is_watched:
            with torch.no_grad():
                self.recorder.record(name, value(), reduce, count=count)

    @property
    def is_watched(self) -> bool:
        """Whether values of this pass are recorded that cost time."""
        return self.recorder.wanted and torch.is_grad_enabled()


@dataclass(frozen=True)
class Continuation:
    """The places of new tokens in decoded sequences, made once for all layers."""

    position_B: Tensor
    """Tokens that the states have absorbed, int64 on the device; rows may differ."""
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin of the new positions: [L, R] or [B, L, R] for a prompt, [B, R] for one token; None if no layer rotates."""
    is_start: bool
    """True if no row has absorbed anything yet: the states are empty and need not be read."""


class Mixer(MixerFacts, MegatronModule):
    """Project in, mix over the sequence, project out. The constructor and forward are those of Megatron's attention slot."""

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
        self.layer_name = f"layer_{layer_number - 1:02d}"
        """The layer in names of metrics: numbers as in names of parameters, in an order that sorts."""
        self.heads = config.model.num_heads // self.group.size()
        self.head_dim = config.model.hidden_size // config.model.num_heads

    def column(self, parts: tuple[int, ...], bias: bool = False) -> Any:
        """Projection from the hidden size to fused parts (unsharded sizes)."""
        return column_linear(self.config, parts, bias=bias, group=self.group, cls=self.submodules.column)

    def row(self, in_features: int, bias: bool = False) -> Any:
        """Projection back to the hidden size (unsharded input size)."""
        return row_linear(self.config, in_features, bias=bias, group=self.group, cls=self.submodules.row)

    @property
    def takes_fp8(self) -> bool:
        """Whether x may be an `Fp8Tokens`: linear layers that take it are all that read it."""
        return False

    @property
    def keeps_received(self) -> bool:
        """True if this pass will be recomputed for its gradients: what it receives must be kept for the second time."""
        return self.config.recompute != "none" and not torch.is_grad_enabled()

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        """x: [L, B, D] normed, cut over tensor parallel ranks under sequence parallelism -> (the mix, alike; no loose bias)."""
        raise NotImplementedError

    def zero_state(self, batch: int, device: torch.device) -> Any:
        """Buffers of `batch` empty sequences, of this rank's heads or channels. Raises ConfigError if they cannot be of constant size."""
        model, ranks = self.config.model, self.group.size()
        share = dataclasses.replace(model, num_heads=model.num_heads // ranks, hidden_size=model.hidden_size // ranks)
        return self.empty_state(share, batch, self.config.params_dtype, device)

    def prefill(self, x: Tensor, state: Any, where: Continuation) -> Tensor:
        """A piece of each prompt, [B, L, D] normed -> the mix, alike; continues from the state and updates it in place."""
        raise NotImplementedError

    def step(self, x: Tensor, state: Any, where: Continuation) -> Tensor:
        """One token of each sequence, [B, D] normed -> the mix, alike; updates the state in place, never waits for the host."""
        raise NotImplementedError


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., H * V] -> a view [..., H, V]."""
    return x.unflatten(-1, (heads, -1))


def heads_first_batch(x: Tensor, heads: int) -> Tensor:
    """Features [L, B, H * V] -> a view [B, L, H, V]."""
    return split_heads(x.transpose(0, 1), heads)


def merge_heads(x: Tensor) -> Tensor:
    """[B, L, H, V] -> contiguous [L, B, H * V], as the projection back needs it."""
    return x.flatten(-2).transpose(0, 1).contiguous()
