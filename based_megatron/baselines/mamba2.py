"""Mamba-2 (arXiv 2405.21060): a state space layer whose state decays by one number for each head and token.

Legend: B sequences, T tokens, L tokens of this rank's slice, D hidden size, E inner width, H heads of this tensor parallel rank,
V head dim, N state dim, C = E + 2 N channels of the convolution, K taps.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.baselines import fla
from based_megatron.baselines.initial import drawn_step_bias, drawn_tap_biases, drawn_taps
from based_megatron.baselines.operations.scalar_decay import scalar_decay, scalar_decay_step
from based_megatron.baselines.slices import state_before
from based_megatron.baselines.state_space import StateSpaceState
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.errors import ConfigError
from based_megatron.kernels.exchange import Halo, ReceivedHalo
from based_megatron.kernels.gated_conv import silu_conv
from based_megatron.kernels.gated_conv.reference import filled_up
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.base import split_heads
from based_megatron.model.mixers.facts import Shape
from based_megatron.model.mixers.gated_conv import CONV
from based_megatron.parallel.linear import Projection, shard_parameter, sum_over_tensor_ranks, tensor_sum
from based_megatron.parallel.sequence.halos import HaloExchange
from based_megatron.parallel.sequence.plan import SequencePlan

RATES = (1.0, 16.0)
"""Range of the initial rates of the decay."""
Count = Annotated[int, Range(at_least=1)]
OF_ALL_HEADS = ("bc.weight", "bc_taps", "bc_bias")


@dataclass(frozen=True)
class Mamba2Options:
    """Settings of Mamba-2."""

    state_dim: Count = 128
    """State elements of a channel."""
    head_dim: Count = 64
    """Channels of a head, which share their decay."""
    expand: Count = 2
    """Inner width, in hidden sizes."""
    conv_taps: Count = 4
    """Taps of the short convolution."""


class Mamba2(Mixer):
    """out_proj(norm(y silu(z))), S_t = exp(-rate dt_t) S_(t-1) + B_t (dt_t x_t)^T, y_t = C_t S_t + skip x_t.

    x, B and C go through a short convolution and silu; B and C are the same for all heads. Tensor parallel ranks share the heads, each
    has all of B and C, and the sums of squares of the norm are added over them.
    """

    letter, name = "N", "mamba2"
    slices = True
    Options = Mamba2Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, options, dtype, ranks = (
            self.config.model,
            self.options(self.config.model),
            self.config.params_dtype,
            self.group.size(),
        )
        E, N, heads = _sizes(model)
        self.inner, self.states, self.heads = E, N, heads // ranks
        self.local_parts = [E // ranks, E // ranks, heads // ranks]
        self.zxdt = self.column((E, E, heads))
        self.bc = nn.Linear(model.hidden_size, 2 * N, bias=False, dtype=dtype)
        sum_over_tensor_ranks(self.bc.weight, self.config)

        def shared(*shape: int) -> nn.Parameter:
            return sum_over_tensor_ranks(nn.Parameter(torch.empty(shape, dtype=dtype)), self.config)

        def cut(*shape: int) -> nn.Parameter:
            return shard_parameter(nn.Parameter(torch.empty(shape[0] // ranks, *shape[1:], dtype=dtype)), dim=0)

        self.x_taps, self.x_bias = cut(E, options.conv_taps), cut(E)
        self.bc_taps, self.bc_bias = shared(2 * N, options.conv_taps), shared(2 * N)
        self.step_bias, self.log_rate, self.skip, self.norm_weight = cut(heads), cut(heads), cut(heads), cut(E)
        self.out_proj = self.row(E)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        plan = inputs.plan
        z, u, steps = (part.transpose(0, 1) for part in self._projected(x))
        v, b, c = self._convolved(u, **self._inputs_before(u, plan))
        q, k, values, g = self._inputs(v, b, c, steps)
        if plan.is_whole and fla.serves(v, self.config.backend):
            o, _state = fla.scalar_decay(q, k, values, g, document_ids_BT=plan.document_ids())
        else:
            before = None if plan.is_whole else state_before(k, values, g[..., None], plan)
            o, _state = scalar_decay(q, k, values, g, initial_state_BHKV=before, document_ids_BT=plan.document_ids())
        return self.out_proj(self._gated(o, v, z).transpose(0, 1).contiguous())[0], None

    def prefill(self, x: Tensor, state: StateSpaceState, where: Continuation) -> Tensor:
        z, u, steps = self._projected(x)
        v, b, c = self._convolved(u, halo_BhD=state.inputs_BhC)
        o, final = scalar_decay(*self._inputs(v, b, c, steps), initial_state_BHKV=state.state)
        state.store(final, u)
        return self.out_proj(self._gated(o, v, z))[0]

    def step(self, x: Tensor, state: StateSpaceState, where: Continuation) -> Tensor:
        z, u, steps = self._projected(x)
        v, b, c = (part[:, 0] for part in self._convolved(u[:, None], halo_BhD=state.inputs_BhC))
        o, final = scalar_decay_step(*self._inputs(v, b, c, steps), state.state)
        state.store(final, u[:, None])
        return self.out_proj(self._gated(o, v, z))[0]

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, the inputs x | B | C of the convolution, and the projection of the steps."""

        def project(projection: Projection) -> Any:
            return projection(), self.bc(projection.x_LBD)

        zxdt, bc = self.zxdt(x, body=project)[0]
        z, u, steps = zxdt.split(self.local_parts, dim=-1)
        return z, torch.cat([u, bc], dim=-1), steps

    def _inputs_before(self, u_BTC: Tensor, plan: SequencePlan) -> dict[str, Any]:
        """What the convolution must know besides its own inputs: those of the slices before, and documents."""
        rows = self.x_taps.shape[1] - 1
        if plan.is_whole or not rows:
            return {"key_document_ids_BS": plan.document_ids()}
        exchange = HaloExchange(plan, CONV, self.layer_number, rows, keep=self.keeps_received)
        arriving = exchange.start(lambda: u_BTC[:, u_BTC.shape[1] - exchange.boundary_rows :].contiguous())
        halo_BNC = ReceivedHalo.apply(u_BTC, Halo(arriving, exchange))
        halo_BhC, ids_BS = filled_up(halo_BNC, plan.document_ids(rows), rows)
        return {"halo_BhD": halo_BhC, "key_document_ids_BS": ids_BS}

    def _convolved(self, u_BTC: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, E], B and C [B, T, N] each."""
        taps, bias = torch.cat([self.x_taps, self.bc_taps]), torch.cat([self.x_bias, self.bc_bias])
        convolved_BTC = silu_conv(u_BTC, taps, bias, backend=self.config.backend, **options)
        v, b, c = convolved_BTC.split([self.local_parts[0], self.states, self.states], dim=-1)
        return v, b, c

    def _inputs(self, v: Tensor, b: Tensor, c: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the scalar decay takes in, of one token or several: q = C, k = B, v = dt x, and log decays."""
        wide = torch.promote_types(steps.dtype, torch.float32)
        dt = functional.softplus(steps.to(wide) + self.step_bias.to(wide))
        values = (split_heads(v, self.heads) * dt[..., None]).to(v.dtype)
        q, k = (part.unsqueeze(-2).expand(*values.shape[:-1], -1) for part in (c, b))
        return q, k, values, -self.log_rate.to(wide).exp() * dt

    def _gated(self, o: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """norm((o + skip x) silu(z)), in the dtype of the weights; the norm is over the heads of all ranks."""
        wide = torch.promote_types(o.dtype, torch.float32)
        y = o.to(wide) + self.skip.to(wide)[:, None] * split_heads(v, self.heads)
        y = y.flatten(-2) * functional.silu(z.to(wide))
        squares = tensor_sum(y.square().sum(-1, keepdim=True), self.group)
        normed = y * torch.rsqrt(squares / self.inner + self.config.model.norm_eps)
        return (normed * self.norm_weight.to(wide)).to(self.norm_weight.dtype)

    @classmethod
    def check(cls, model: ModelConfig, tensor: int) -> None:
        options, E = cls.options(model), model.hidden_size * cls.options(model).expand
        if E % (options.head_dim * tensor):
            raise ConfigError(
                f"mamba2 has an inner width of {E}, which is no multiple of mamba2.head_dim={options.head_dim} times parallel.tensor="
                f"{tensor}; change mamba2.head_dim or mamba2.expand in model.mixer_options, or parallel.tensor"
            )

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D, taps, (E, N, H) = model.hidden_size, cls.options(model).conv_taps, _sizes(model)
        return {
            "zxdt.weight": (2 * E + H, D),
            "bc.weight": (2 * N, D),
            "x_taps": (E, taps),
            "x_bias": (E,),
            "bc_taps": (2 * N, taps),
            "bc_bias": (2 * N,),
            "step_bias": (H,),
            "log_rate": (H,),
            "skip": (H,),
            "norm_weight": (E,),
            "out_proj.weight": (D, E),
        }

    @staticmethod
    def tensor_dim(name: str) -> int | None:
        return None if name in OF_ALL_HEADS else Mixer.tensor_dim(name)

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token: for each element of the state 1 to decay, 2 to add, 2 to read; 2 for each tap."""
        E, N, _ = _sizes(model)
        return 5.0 * E * N + 2.0 * Mamba2.options(model).conv_taps * (E + 2 * N)

    @staticmethod
    def initial(name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: rates U(1, 16), steps of 0.001 to 0.1, taps, biases as PyTorch's, skips and norm 1; all else as usual."""
        if name.endswith("_taps"):
            return drawn_taps(shape, generator)
        if name in ("x_bias", "bc_bias"):
            return drawn_tap_biases(shape, Mamba2.options(model).conv_taps, generator)
        if name == "step_bias":
            return drawn_step_bias(shape, generator)
        if name == "log_rate":
            return torch.empty(shape).uniform_(*RATES, generator=generator).log()
        if name in ("skip", "norm_weight"):
            return torch.ones(shape)
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        return name.endswith((".weight", "_taps"))

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> StateSpaceState:
        E, N, H = _sizes(model)
        taps = cls.options(model).conv_taps
        return StateSpaceState.zeros(batch, (H, N, E // H), (taps - 1, E + 2 * N), dtype, device)


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Inner width E, state dim N and heads."""
    options = Mamba2.options(model)
    E = model.hidden_size * options.expand
    return E, options.state_dim, E // options.head_dim
