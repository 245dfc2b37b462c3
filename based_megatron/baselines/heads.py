"""What baselines with heads have in common: a norm of each head, a matrix for each head as state, and linear attention with both.

Legend: B sequences, T tokens, L tokens of this rank's slice, H heads of this tensor parallel rank, K key dim, V value head dim.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.baselines import fla
from based_megatron.baselines.slices import state_before
from based_megatron.config import ModelConfig
from based_megatron.errors import ConfigError
from based_megatron.model.config import BasedConfig
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.base import merge_heads
from based_megatron.parallel.linear import sum_over_tensor_ranks

Operation = Callable[..., tuple[Tensor, Any]]
Rotary = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class MatrixState:
    """The decoding state of a batch of sequences."""

    state_BHKV: Tensor
    """fp32, or fp64 under fp64 models."""

    @classmethod
    def zeros(cls, *shape: int, dtype: torch.dtype, device: torch.device) -> "MatrixState":
        """The state [B, H, K, V] of empty sequences in a model of `dtype`."""
        return cls(torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device))


class GatedHeadNorm(nn.Module):
    """RMSNorm of each head, computed in fp32 or wider, times silu(gate) if there is one. One weight for all heads."""

    def __init__(self, config: BasedConfig, head_dim: int) -> None:
        super().__init__()
        self.eps = config.model.norm_eps
        self.weight = sum_over_tensor_ranks(nn.Parameter(torch.empty(head_dim, dtype=config.params_dtype)), config)

    def forward(self, x_BTHV: Tensor, gate_BTHV: Tensor | None = None) -> Tensor:
        """The normed and gated heads, in the dtype of the weight."""
        dtype = torch.promote_types(x_BTHV.dtype, torch.float32)
        normed = functional.rms_norm(x_BTHV.to(dtype), x_BTHV.shape[-1:], self.weight.to(dtype), self.eps)
        if gate_BTHV is not None:
            normed = normed * functional.silu(gate_BTHV.to(dtype))
        return normed.to(self.weight.dtype)


class DecayedAttention(Mixer):
    """out_proj(norm(o) silu(gate)), where o is linear attention with a state that decays: what RetNet and GLA have in common.

    Heads are independent: tensor parallel ranks exchange nothing between the projections. Of a slice, the operation starts from the
    state before it.
    """

    slices = True
    whole: Operation
    """The operation over sequences."""
    one_token: Operation
    """The operation for one token of each."""
    whole_by_fla: Operation
    """What fla-core has in place of the first, without a state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, parts = self.config.model, self.parts(self.config.model)
        self.local_parts = [size // self.group.size() for size in parts]
        self.qkvg = self.column(parts)
        self.norm = GatedHeadNorm(self.config, parts[2] // model.num_heads)
        self.out_proj = self.row(parts[2])
        self.scale = (parts[0] // model.num_heads) ** -0.5

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        parts = tuple(part.transpose(0, 1) for part in self._projected(x))
        q, k, v, gate, g = self._positioned(parts, inputs.rotary)
        options = {"scale": self.scale, "document_ids_BT": inputs.plan.document_ids()}
        if not inputs.plan.is_whole:
            decays = g if g.ndim == k.ndim else g[..., None]
            before = state_before(k, v, decays, inputs.plan)
            o_BLHV, _state = self.whole(q, k, v, g, initial_state_BHKV=before, **options)
        elif fla.serves(q, self.config.backend):
            o_BLHV, _state = self.whole_by_fla(q, k, v, g, **options)
        else:
            o_BLHV, _state = self.whole(q, k, v, g, **options)
        return self.out_proj(merge_heads(self.norm(o_BLHV, gate)))[0], None

    def prefill(self, x: Tensor, state: MatrixState, where: Continuation) -> Tensor:
        q, k, v, gate, g = self._positioned(self._projected(x), where.rotary)
        o, final = self.whole(q, k, v, g, scale=self.scale, initial_state_BHKV=state.state_BHKV)
        state.state_BHKV.copy_(final)
        return self.out_proj(self.norm(o, gate).flatten(-2))[0]

    def step(self, x: Tensor, state: MatrixState, where: Continuation) -> Tensor:
        q, k, v, gate, g = self._positioned(self._projected(x), where.rotary)
        o, final = self.one_token(q, k, v, g, state.state_BHKV, scale=self.scale)
        state.state_BHKV.copy_(final)
        return self.out_proj(self.norm(o, gate).flatten(-2))[0]

    @abstractmethod
    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, gate and log decays of tokens [..., D]: [..., H, K or V] each, the decays as the operation takes them."""

    def _positioned(self, parts: tuple[Tensor, ...], rotary: Rotary) -> tuple[Tensor, ...]:
        """These parts at their positions: [B, L, ...] with tables [L, R] or [B, L, R], one token [B, ...] with [B, R]."""
        return parts

    @staticmethod
    @abstractmethod
    def parts(model: ModelConfig) -> tuple[int, int, int, int]:
        """Rows of the fused q | k | v | gate weight."""

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> MatrixState:
        H, (_, K, V, _) = model.num_heads, cls.parts(model)
        return MatrixState.zeros(batch, H, K // H, V // H, dtype=dtype, device=device)


def check_widths(mixer: type[Mixer], model: ModelConfig) -> None:
    """Raise ConfigError if heads cannot share the widths that the options expand_k and expand_v make of the hidden size."""
    options = mixer.options(model)
    for key in ("expand_k", "expand_v"):
        expand = getattr(options, key)
        width = model.hidden_size * expand
        if width % model.num_heads:
            raise ConfigError(
                f"{mixer.name} cannot have {model.num_heads} heads in a width of {width:g}; change model.num_heads or "
                f"{mixer.name}.{key}={expand:g} in model.mixer_options"
            )
