"""RWKV-7 (arXiv 2503.14456): a state whose transition is a decay of each key channel and the removal of what a key finds.

Two things of the published model are not here. Its values are mixed with those of the first layer, but a mixer knows its own layer
alone; and its feed-forward part is the block's, as for all mixers.

Legend: B sequences, T tokens, L tokens of this rank's slice, D hidden size, H heads, K key dim, V = K value head dim.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from based_megatron.baselines import fla
from based_megatron.baselines.operations.dplr import dplr, dplr_step
from based_megatron.baselines.token_shift import shifted, tokens_before
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.errors import ConfigError
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.base import split_heads
from based_megatron.model.mixers.facts import Shape
from based_megatron.model.norm import HeadNorm

SMALLEST_LOG_DECAY = -math.exp(-0.5)
"""The strongest decay of a token."""
MIXES = ("r", "k", "v", "decay", "rate", "gate")
"""Rows of `token_mix`."""
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""r, k', v, -kk, a kk and w, all [.., H, K]."""


@dataclass(frozen=True)
class RWKV7Options:
    """Settings of RWKV-7; its heads are model.num_heads, of 64 channels as published."""

    decay_rank: Annotated[int, Range(at_least=1)] = 64
    """Rank of the map from tokens to decays."""
    rate_rank: Annotated[int, Range(at_least=1)] = 64
    """Rank of the map from tokens to the rates at which values are replaced."""
    gate_rank: Annotated[int, Range(at_least=1)] = 160
    """Rank of the map from tokens to gates."""


@dataclass(frozen=True)
class RWKV7State:
    """The decoding state of a batch of sequences."""

    state_BHKV: Tensor
    """fp32, or fp64 under fp64 models."""
    last_BD: Tensor
    """The last input, in the model's dtype."""


class LowRank(nn.Module):
    """A map through few channels: up(activation(down(x)))."""

    def __init__(self, width: int, rank: int, activation: Any, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = activation
        self.down = skip_init(nn.Linear, width, rank, bias=False, dtype=dtype)
        self.up = skip_init(nn.Linear, rank, width, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.up(self.activation(self.down(x)))


class RWKV7(Mixer):
    """out_proj((norm(o) + (r.(k' r_k)) v) gate), S_t = S diag(e^w) - (S kk) (a kk)^T + v k'^T, o_t = S_t r_t.

    kk is the normalised key k k_k, k' = k (1 + (a - 1) k_a), w = -0.61 sigmoid of a map of low rank, a a sigmoid of another.
    """

    letter, name = "W", "rwkv7"
    shards = False
    Options = RWKV7Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, dtype = self.config.model, self.config.params_dtype
        D, options = model.hidden_size, self.options(model)

        def channels(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        self.token_mix = channels(len(MIXES), D)
        self.r_proj, self.k_proj, self.v_proj = (self.column((D,)) for _ in range(3))
        self.decay = LowRank(D, options.decay_rank, torch.tanh, bias=True, dtype=dtype)
        self.rate = LowRank(D, options.rate_rank, nn.Identity(), bias=True, dtype=dtype)
        self.gate = LowRank(D, options.gate_rank, torch.sigmoid, bias=False, dtype=dtype)
        self.k_k, self.k_a, self.r_k = (channels(D) for _ in range(3))
        self.norm = HeadNorm(self.config, self.heads, self.head_dim, model.norm_eps * self.head_dim)
        self.out_proj = self.row(D)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        x_BLD, ids = x.transpose(0, 1), inputs.plan.document_ids()
        operands, gate = self._projected(x_BLD, tokens_before(x_BLD, document_ids_BT=ids))
        is_served = x.dtype is torch.bfloat16 and fla.serves(x, self.config.backend)
        o_BLHV, _state = (fla.dplr if is_served else dplr)(*operands, document_ids_BT=ids)
        return self._out(o_BLHV, operands, gate).transpose(0, 1).contiguous(), None

    def prefill(self, x: Tensor, state: RWKV7State, where: Continuation) -> Tensor:
        operands, gate = self._projected(x, tokens_before(x, last_BD=state.last_BD))
        initial = None if where.is_start else state.state_BHKV
        o_BLHV, final = dplr(*operands, initial_state_BHKV=initial, return_final_state=True)
        assert final is not None
        state.state_BHKV.copy_(final)
        state.last_BD.copy_(x[:, -1])
        return self._out(o_BLHV, operands, gate)

    def step(self, x: Tensor, state: RWKV7State, where: Continuation) -> Tensor:
        operands, gate = self._projected(x, state.last_BD)
        o_BHV, new = dplr_step(*operands, state.state_BHKV)
        state.state_BHKV.copy_(new)
        state.last_BD.copy_(x)
        return self._out(o_BHV, operands, gate)

    def _projected(self, x: Tensor, before: Tensor) -> tuple[Operands, Tensor]:
        """What the recurrence takes, and the gate, of inputs [.., D] and those one token earlier."""
        of_r, of_k, of_v, of_decay, of_rate, of_gate = shifted(x, before, self.token_mix)
        r, k, v = self.r_proj(of_r)[0], self.k_proj(of_k)[0], self.v_proj(of_v)[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        w = SMALLEST_LOG_DECAY * self.decay(of_decay).to(dtype).sigmoid()
        rate = self.rate(of_rate).to(dtype).sigmoid()
        k, k_k, k_a = (part.to(dtype) for part in (k, self.k_k, self.k_a))
        replaced = k * (1 + (rate - 1) * k_a)
        r, replaced, v, w, rate, k = (split_heads(part, self.heads) for part in (r, replaced, v, w, rate, k * k_k))
        k = functional.normalize(k, dim=-1)
        return (r, replaced, v, -k, rate * k, w), self.gate(of_gate)

    def _out(self, o: Tensor, operands: Operands, gate: Tensor) -> Tensor:
        """The projection back, [.., D], of outputs [.., H, V]."""
        r, k, v, *_ = operands
        bonus = (r * k * split_heads(self.r_k, self.heads)).sum(-1, keepdim=True) * v
        normed = self.norm(o.to(bonus.dtype))
        return self.out_proj((normed + bonus).flatten(-2).to(gate.dtype) * gate)[0]

    @classmethod
    def check(cls, model: ModelConfig, tensor: int) -> None:
        if model.hidden_size % model.num_heads:
            raise ConfigError(
                f"{cls.name} cannot have {model.num_heads} heads in a width of {model.hidden_size}; change model.num_heads or "
                f"model.hidden_size"
            )

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D, options = model.hidden_size, cls.options(model)
        shapes: dict[str, Shape] = {"token_mix": (len(MIXES), D), "k_k": (D,), "k_a": (D,), "r_k": (D,)}
        shapes |= {f"{name}_proj.weight": (D, D) for name in "rkv"}
        for name in ("decay", "rate", "gate"):
            rank = getattr(options, f"{name}_rank")
            shapes |= {f"{name}.down.weight": (rank, D), f"{name}.up.weight": (D, rank)}
        shapes |= {"decay.up.bias": (D,), "rate.up.bias": (D,)}
        return shapes | {"norm.weight": (D,), "norm.bias": (D,), "out_proj.weight": (D, D)}

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrence, for each element of the state: 2 each to read what a key finds, to remove it,

        to write and to read the output, and 1 for the decay.
        """
        return 9.0 * model.hidden_size**2 / model.num_heads

    @classmethod
    def initial(cls, name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32, as published for the layer in the middle of a model; maps of low rank are their biases at first."""
        if name.endswith(".down.weight"):
            return torch.zeros(shape)
        D = model.hidden_size
        place_D = torch.arange(D) / max(D - 1, 1)
        if name == "token_mix":
            powers = {"r": 0.2, "k": 0.7, "v": 0.7, "decay": 0.9, "rate": 0.9, "gate": 0.2}
            return torch.stack([1 - (torch.arange(D) / D) ** (powers[mix] / 2) for mix in MIXES])
        in_head_D = torch.linspace(-1, 1, D // model.num_heads).repeat(model.num_heads)
        zigzag_D = in_head_D * in_head_D.abs()
        values = {
            "decay.up.bias": -5.5 + 6 * place_D ** (1 + 0.5**0.3) + 2.5 * zigzag_D,
            "rate.up.bias": -0.19 + 0.4 * (place_D - 0.5) + 0.3 * zigzag_D,
            "k_k": 0.71 - 0.1 * (place_D - 0.5),
            "k_a": torch.full((D,), 1.02),
            "r_k": torch.full((D,), -0.04),
        }
        return values[name] if name in values else Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        """True for matrices alone."""
        return name.endswith(".weight") and name != "norm.weight"

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> RWKV7State:
        D, H, wide = model.hidden_size, model.num_heads, torch.promote_types(dtype, torch.float32)
        return RWKV7State(
            torch.zeros(batch, H, D // H, D // H, dtype=wide, device=device),
            torch.zeros(batch, D, dtype=dtype, device=device),
        )
