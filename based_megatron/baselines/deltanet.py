"""DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464): a state of keys to values that overwrites what it holds under a key.

Legend: B sequences, T tokens, L tokens of this rank's slice, H heads of this tensor parallel rank, K key dim, V value head dim,
C channels of queries, keys and values, h = taps - 1 inputs in front of the convolution.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.baselines import fla
from based_megatron.baselines.heads import GatedHeadNorm, check_widths
from based_megatron.baselines.initial import drawn_step_bias, drawn_taps
from based_megatron.baselines.operations.delta import delta_rule, delta_step
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.kernels.decode import ConvState, conv_step
from based_megatron.kernels.gated_conv import gated_conv
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.base import merge_heads, split_heads
from based_megatron.model.mixers.facts import Shape
from based_megatron.parallel.linear import shard_parameter

KEY_EPS = 1e-6
"""Added to the squared norm of queries and keys."""
RATES = (1e-4, 16.0)
"""Range of the initial rates of the decay."""


@dataclass(frozen=True)
class DeltaNetOptions:
    """Settings of DeltaNet; its heads are model.num_heads."""

    expand_k: Annotated[float, Range(above=0, at_most=16)] = 1.0
    """Width of queries and keys, in hidden sizes."""
    expand_v: Annotated[float, Range(above=0, at_most=16)] = 1.0
    """Width of values, in hidden sizes."""
    conv_taps: Annotated[int, Range(at_least=1, at_most=16)] = 4
    """Taps of the convolution of queries, keys and values; 1 mixes no tokens."""
    gate: bool = False
    """Whether normed outputs are multiplied by silu of a gate."""


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaNetOptions):
    """Settings of Gated DeltaNet; its heads are model.num_heads."""

    expand_k: Annotated[float, Range(above=0, at_most=16)] = 0.75
    """Width of queries and keys, in hidden sizes."""
    expand_v: Annotated[float, Range(above=0, at_most=16)] = 1.5
    """Width of values, in hidden sizes."""
    gate: bool = True
    """Whether normed outputs are multiplied by silu of a gate."""


@dataclass(frozen=True)
class DeltaState:
    """The decoding state of a batch of sequences."""

    state_BHKV: Tensor
    """fp32, or fp64 under fp64 models."""
    inputs_BhC: Tensor
    """The last inputs of the convolution, in the model's dtype."""


class DeltaRule(Mixer):
    """out_proj(norm(o)), S_t = S + beta k (v - S^T k)^T with S = e^g S_(t-1), and o_t = S_t^T q / sqrt(K).

    q, k and v go through a short convolution and silu; q and k are then normalised, and beta is a sigmoid. Heads are independent:
    tensor parallel ranks exchange nothing between the projections.
    """

    decaying = False
    """Whether the state decays: g = -rate softplus(step), else 0."""
    Options = DeltaNetOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, dtype, ranks = self.config.model, self.config.params_dtype, self.group.size()
        parts = self.parts(model)
        self.local_parts = [size // ranks for size in parts]
        self.in_proj = self.column(parts)
        taps = torch.empty(sum(self.local_parts[:3]), self.options(model).conv_taps, dtype=dtype)
        self.conv_weight = shard_parameter(nn.Parameter(taps), dim=0, parts=parts[:3])
        if self.decaying:
            self.log_rate = shard_parameter(nn.Parameter(torch.empty(self.heads, dtype=dtype)), dim=0)
            self.step_bias = shard_parameter(nn.Parameter(torch.empty(self.heads, dtype=dtype)), dim=0)
        self.norm = GatedHeadNorm(self.config, parts[2] // model.num_heads)
        self.out_proj = self.row(parts[2])
        self.scale = (parts[0] // model.num_heads) ** -0.5

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        qkv_BLC, gate_BLHV, rates = self._projected(self.in_proj(x)[0].transpose(0, 1))
        ids = inputs.plan.document_ids()
        rule = self._rule(self._convolved(qkv_BLC, document_ids_BT=ids), rates)
        # The library's kernels of the delta rules take no fp32.
        is_served = qkv_BLC.dtype is torch.bfloat16 and fla.serves(qkv_BLC, self.config.backend)
        run = fla.delta_rule if is_served else delta_rule
        o_BLHV, _state = run(*rule, scale=self.scale, document_ids_BT=ids)
        return self.out_proj(merge_heads(self.norm(o_BLHV, gate_BLHV)))[0], None

    def prefill(self, x: Tensor, state: DeltaState, where: Continuation) -> Tensor:
        qkv_BLC, gate_BLHV, rates = self._projected(self.in_proj(x)[0])
        convolved_BLC = self._convolved(qkv_BLC, halo_BhC=state.inputs_BhC)
        ConvState(state.inputs_BhC).store(qkv_BLC)
        o_BLHV, final = delta_rule(
            *self._rule(convolved_BLC, rates),
            scale=self.scale,
            initial_state_BHKV=None if where.is_start else state.state_BHKV,
            return_final_state=True,
        )
        assert final is not None
        state.state_BHKV.copy_(final)
        return self.out_proj(self.norm(o_BLHV, gate_BLHV).flatten(-2))[0]

    def step(self, x: Tensor, state: DeltaState, where: Continuation) -> Tensor:
        qkv_BC, gate_BHV, rates = self._projected(self.in_proj(x)[0])
        convolved_BC = conv_step(
            qkv_BC, _ones_like(qkv_BC), self.conv_weight, ConvState(state.inputs_BhC), backend=self.config.backend
        )
        o_BHV, new = delta_step(*self._rule(convolved_BC, rates), state.state_BHKV, scale=self.scale)
        state.state_BHKV.copy_(new)
        return self.out_proj(self.norm(o_BHV, gate_BHV).flatten(-2))[0]

    def _projected(self, projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """([.., C] the inputs of the convolution, [.., H, V] the gate if there is one, the projections of beta and of steps)."""
        channels = sum(self.local_parts[:3])
        rates = self.heads * (2 if self.decaying else 1)
        qkv, gate, rates = projected.split([channels, sum(self.local_parts[3:]) - rates, rates], dim=-1)
        return qkv, split_heads(gate, self.heads) if gate.shape[-1] else None, rates

    def _convolved(
        self, qkv_BLC: Tensor, halo_BhC: Tensor | None = None, document_ids_BT: Tensor | None = None
    ) -> Tensor:
        return gated_conv(
            qkv_BLC,
            _ones_like(qkv_BLC),
            self.conv_weight,
            halo_BhD=halo_BhC,
            key_document_ids_BS=document_ids_BT,
            backend=self.config.backend,
        )

    def _rule(self, qkv: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What the delta rule takes in: q, k, v, beta and log decay, of one token or several."""
        q, k, v = (split_heads(part, self.heads) for part in qkv.split(self.local_parts[:3], dim=-1))
        rates = rates.to(torch.promote_types(rates.dtype, torch.float32))
        beta = rates[..., : self.heads].sigmoid()
        log_decay = None
        if self.decaying:
            steps = functional.softplus(rates[..., self.heads :] + self.step_bias.to(rates.dtype))
            log_decay = -self.log_rate.to(rates.dtype).exp() * steps
        return _normalised(q), _normalised(k), v, beta, log_decay

    @classmethod
    def parts(cls, model: ModelConfig) -> tuple[int, ...]:
        """Rows of the fused weight: q | k | v | gate, if there is one | beta | steps, if the state decays."""
        options = cls.options(model)
        key, value = round(model.hidden_size * options.expand_k), round(model.hidden_size * options.expand_v)
        gate = (value,) if options.gate else ()
        return (key, key, value, *gate, *(model.num_heads,) * (2 if cls.decaying else 1))

    @classmethod
    def check(cls, model: ModelConfig, tensor: int) -> None:
        check_widths(cls, model)

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D, H, parts = model.hidden_size, model.num_heads, cls.parts(model)
        decay: dict[str, Shape] = {"log_rate": (H,), "step_bias": (H,)} if cls.decaying else {}
        return {
            "in_proj.weight": (sum(parts), D),
            "conv_weight": (sum(parts[:3]), cls.options(model).conv_taps),
            **decay,
            "norm.weight": (parts[2] // H,),
            "out_proj.weight": (D, parts[2]),
        }

    @classmethod
    def mixing_flops(cls, model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrence, for each element of the state: 2 each to read the old value, to write

        the new one and to read the output, and 1 for the decay; and 2 for each tap of the convolution.
        """
        parts = cls.parts(model)
        state = parts[0] * parts[2] / model.num_heads
        return (7.0 if cls.decaying else 6.0) * state + 2.0 * sum(parts[:3]) * cls.options(model).conv_taps

    @classmethod
    def initial(cls, name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: taps U(-1 / sqrt(taps), 1 / sqrt(taps)); rates U(0, 16), and steps of 0.001 to 0.1 before the input
        has a say; all else as for other mixers.
        """
        if name == "conv_weight":
            return drawn_taps(shape, generator)
        if name == "log_rate":
            return torch.empty(shape).uniform_(*RATES, generator=generator).log()
        if name == "step_bias":
            return drawn_step_bias(shape, generator)
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        return Mixer.decays(name) and name not in ("log_rate", "step_bias")

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> DeltaState:
        H, (K, _, V, *_), wide = model.num_heads, cls.parts(model), torch.promote_types(dtype, torch.float32)
        taps, channels = cls.options(model).conv_taps, 2 * K + V
        return DeltaState(
            torch.zeros(batch, H, K // H, V // H, dtype=wide, device=device),
            ConvState.zeros(batch, taps, channels, dtype=dtype, device=device).inputs_BhD,
        )


class DeltaNet(DeltaRule):
    """The delta rule without a decay."""

    letter, name = "D", "deltanet"


class GatedDeltaNet(DeltaRule):
    """The delta rule with a decay that depends on the token."""

    letter, name = "E", "gated_deltanet"
    decaying = True
    Options = GatedDeltaNetOptions


def _ones_like(x: Tensor) -> Tensor:
    """A gate that changes nothing, as one row that all tokens share."""
    return torch.ones_like(x[(0,) * (x.ndim - 1)]).expand_as(x)


def _normalised(x: Tensor) -> Tensor:
    """Heads of length 1, fp32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + KEY_EPS).rsqrt()
