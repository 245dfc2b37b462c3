"""RetNet (arXiv 2307.08621): linear attention with a constant decay for each head, rotary positions, and a gated norm of each head.

Legend: B sequences, T tokens, L tokens of this rank's slice, H heads of this tensor parallel rank, K key dim, V value head dim.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from based_megatron.baselines import fla
from based_megatron.baselines.heads import GatedHeadNorm, MatrixState
from based_megatron.baselines.operations.scalar_decay import scalar_decay, scalar_decay_step
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.kernels.rotary import apply_rotary
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.base import heads_first_batch, merge_heads, split_heads
from based_megatron.model.mixers.facts import Shape


@dataclass(frozen=True)
class RetNetOptions:
    """Settings of RetNet; its heads are model.num_heads, their key dim is hidden_size / num_heads."""

    expand_v: Annotated[int, Range(at_least=1, at_most=16)] = 2
    """Width of values and gates, in hidden sizes."""


class RetNet(Mixer):
    """out_proj(norm(o) silu(gate)), S_t = g_h S_(t-1) + k_t v_t^T, g_h = 1 - 2^(-5-h), o_t = q_t S_t / sqrt(K).

    Heads are independent: tensor parallel ranks exchange nothing between the projections.
    """

    letter, name = "R", "retnet"
    rotates = True
    Options = RetNetOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parts = _parts(self.config.model)
        self.local_parts = [size // self.group.size() for size in parts]
        self.qkvg = self.column(parts)
        self.norm = GatedHeadNorm(self.config, parts[-1] // self.config.model.num_heads)
        self.out_proj = self.row(parts[-1])
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        parts = self.qkvg(x)[0].split(self.local_parts, dim=-1)
        q, k, v, gate = (heads_first_batch(part, self.heads) for part in parts)
        q, k = self._rotated(q, k, inputs.rotary)
        run = fla.scalar_decay if fla.serves(q, self.config.backend) else scalar_decay
        o_BLHV, _state = run(
            q, k, v, self._log_decay(q[..., 0]), scale=self.scale, document_ids_BT=inputs.plan.document_ids()
        )
        return self.out_proj(merge_heads(self.norm(o_BLHV, gate)))[0], None

    def prefill(self, x: Tensor, state: MatrixState, where: Continuation) -> Tensor:
        q, k, v, gate = self._projected(x)
        q, k = self._rotated(q, k, where.rotary)
        o, final = scalar_decay(
            q, k, v, self._log_decay(q[..., 0]), scale=self.scale, initial_state_BHKV=state.state_BHKV
        )
        state.state_BHKV.copy_(final)
        return self.out_proj(self.norm(o, gate).flatten(-2))[0]

    def step(self, x: Tensor, state: MatrixState, where: Continuation) -> Tensor:
        q, k, v, gate = self._projected(x)
        q, k = (part[:, 0] for part in self._rotated(q[:, None], k[:, None], _one_token(where.rotary)))
        o, final = scalar_decay_step(q, k, v, self._log_decay(q[..., 0]), state.state_BHKV, scale=self.scale)
        state.state_BHKV.copy_(final)
        return self.out_proj(self.norm(o, gate).flatten(-2))[0]

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(split_heads(part, self.heads) for part in self.qkvg(x)[0].split(self.local_parts, dim=-1))

    def _rotated(self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        assert rotary is not None
        return tuple(apply_rotary(x, *rotary, backend=self.config.backend) for x in (q, k))  # type: ignore[return-value]

    def _log_decay(self, like_H: Tensor) -> Tensor:
        """log g_h of this rank's heads, in the shape [..., H] of the argument."""
        first = self.heads * self.group.rank()
        exponents_H = -5.0 - torch.arange(first, first + self.heads, device=like_H.device)
        dtype = torch.promote_types(like_H.dtype, torch.float32)
        return torch.log1p(-exponents_H.to(torch.float64).exp2()).to(dtype).expand_as(like_H)

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D, parts = model.hidden_size, _parts(model)
        V = parts[-1]
        return {"qkvg.weight": (sum(parts), D), "norm.weight": (V // model.num_heads,), "out_proj.weight": (D, V)}

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrence: 2 to add k v^T and 2 to read it, for each element of the state."""
        _, K, V, _ = _parts(model)
        return 4.0 * K * V / model.num_heads

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> MatrixState:
        _, K, V, _ = _parts(model)
        H = model.num_heads
        return MatrixState.zeros(batch, H, K // H, V // H, dtype=dtype, device=device)


def _parts(model: ModelConfig) -> tuple[int, int, int, int]:
    """Rows of the fused q | k | v | gate weight."""
    width = model.hidden_size * RetNet.options(model).expand_v
    return model.hidden_size, model.hidden_size, width, width


def _one_token(rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Tables [B, R] of one token a sequence as tables [B, 1, R]."""
    return None if rotary is None else (rotary[0][:, None], rotary[1][:, None])
