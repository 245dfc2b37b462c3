"""RetNet (arXiv 2307.08621): linear attention with a constant decay for each head, rotary positions, and a gated norm of each head.

Legend: H heads of this tensor parallel rank, K key dim, V value head dim.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from based_megatron.baselines import fla
from based_megatron.baselines.heads import DecayedAttention, Rotary
from based_megatron.baselines.operations.scalar_decay import scalar_decay, scalar_decay_step
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.kernels.rotary import apply_rotary
from based_megatron.model.mixers.base import split_heads
from based_megatron.model.mixers.facts import Shape


@dataclass(frozen=True)
class RetNetOptions:
    """Settings of RetNet; its heads are model.num_heads, their key dim is hidden_size / num_heads."""

    expand_v: Annotated[int, Range(at_least=1, at_most=16)] = 2
    """Width of values and gates, in hidden sizes."""


class RetNet(DecayedAttention):
    """S_t = g_h S_(t-1) + k_t v_t^T, g_h = 1 - 2^(-5-h), o_t = q_t S_t / sqrt(K)."""

    letter, name = "R", "retnet"
    rotates = True
    Options = RetNetOptions
    whole, one_token = staticmethod(scalar_decay), staticmethod(scalar_decay_step)
    whole_by_fla = staticmethod(fla.scalar_decay)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = [split_heads(part, self.heads) for part in self.qkvg(x)[0].split(self.local_parts, dim=-1)]
        return (*parts, self._log_decay(parts[0][..., 0]))

    def _positioned(self, parts: tuple[Tensor, ...], rotary: Rotary) -> tuple[Tensor, ...]:
        assert rotary is not None
        q, k, *others = parts
        if q.ndim == 3:  # one token: a sequence of that length
            tables = [table[:, None] for table in rotary]
            q, k = (apply_rotary(x[:, None], *tables, backend=self.config.backend)[:, 0] for x in (q, k))
        else:
            q, k = (apply_rotary(x, *rotary, backend=self.config.backend) for x in (q, k))
        return q, k, *others

    def _log_decay(self, like_H: Tensor) -> Tensor:
        """log g_h of this rank's heads, in the shape [..., H] of the argument."""
        first = self.heads * self.group.rank()
        exponents_H = -5.0 - torch.arange(first, first + self.heads, device=like_H.device)
        dtype = torch.promote_types(like_H.dtype, torch.float32)
        return torch.log1p(-exponents_H.to(torch.float64).exp2()).to(dtype).expand_as(like_H)

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D, parts = model.hidden_size, cls.parts(model)
        V = parts[2]
        return {"qkvg.weight": (sum(parts), D), "norm.weight": (V // model.num_heads,), "out_proj.weight": (D, V)}

    @classmethod
    def mixing_flops(cls, model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrence: 2 to add k v^T and 2 to read it, for each element of the state."""
        _, K, V, _ = cls.parts(model)
        return 4.0 * K * V / model.num_heads

    @staticmethod
    def parts(model: ModelConfig) -> tuple[int, int, int, int]:
        width = model.hidden_size * RetNet.options(model).expand_v
        return model.hidden_size, model.hidden_size, width, width
