"""H3 (arXiv 2212.14052): a shift of keys, outer products of keys and values in small heads, and a diagonal state space that keeps them.

Fourier transforms cannot keep packed documents apart.

Legend: B sequences, L tokens of this rank's slice, T tokens, D hidden size, H heads, J key and V = J value channels of a head, N state dim,
M = N / 2 complex numbers of a state, h = N - 1 keys in front of the shift.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.baselines.initial import drawn_log_steps
from based_megatron.baselines.operations.convolution import long_convolution
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.errors import ConfigError
from based_megatron.kernels.decode import ConvState
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.facts import SavedPiece, Shape


@dataclass(frozen=True)
class H3Options:
    """Settings of H3."""

    state_dim: Annotated[int, Range(at_least=2, multiple_of=2)] = 64
    """Real numbers of the state of each channel, and taps of the shift of keys."""
    head_dim: Annotated[int, Range(at_least=1)] = 2
    """Channels of a head, in which every key meets every value."""


@dataclass(frozen=True)
class H3State:
    """The decoding state of a batch of sequences: D x head_dim x N numbers, where published sizes count D x N."""

    moments_BHJVM2: Tensor
    """Real and imaginary parts of the state space, fp32, or fp64 under fp64 models."""
    keys_BhD: Tensor
    """The last keys before the shift, in the model's dtype."""


class H3(Mixer):
    """out_proj(sum_j q_j SSM(shift(k)_j v)), by heads; shift is a filter of N taps, SSM a diagonal state space, both with a skip."""

    letter, name = "K", "h3"
    shards = isolates = False
    Options = H3Options

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, dtype = self.config.model, self.config.params_dtype
        D = model.hidden_size
        self.qkv, self.out_proj = self.column((D, D, D)), self.row(D)
        for name, shape in _inner_shapes(model).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x)[0].permute(1, 2, 0).chunk(3, dim=1)
        o_BDL, _products = self._read(q, self._shifted(k), v)
        return self.out_proj(o_BDL.permute(2, 0, 1).to(x.dtype).contiguous())[0], None

    def prefill(self, x: Tensor, state: H3State, where: Continuation) -> Tensor:
        q, k, v = self.qkv(x)[0].mT.chunk(3, dim=1)
        joined_k = torch.cat([state.keys_BhD.mT, k], dim=-1)
        shifted_k = self._shifted(joined_k)[..., joined_k.shape[-1] - k.shape[-1] :]
        o_BDL, products_BHJVT = self._read(q, shifted_k, v, torch.view_as_complex(state.moments_BHJVM2))
        ConvState(state.keys_BhD).store(k.mT)
        moments = torch.view_as_real(self._final(products_BHJVT, torch.view_as_complex(state.moments_BHJVM2)))
        state.moments_BHJVM2.copy_(moments)
        return self.out_proj(o_BDL.mT.to(x.dtype))[0]

    def step(self, x: Tensor, state: H3State, where: Continuation) -> Tensor:
        return self.prefill(x[:, None], state, where)[:, 0]

    def _shifted(self, k_BDT: Tensor) -> Tensor:
        """Keys after the filter of N taps and its skip, in fp32 or wider."""
        T, taps_DN = k_BDT.shape[-1], self.taps
        taps_DT = functional.pad(taps_DN, (0, max(0, T - taps_DN.shape[1])))[:, :T]
        return long_convolution(k_BDT, taps_DT) + self.key_skip[:, None] * k_BDT

    def _read(
        self, q_BDT: Tensor, k_BDT: Tensor, v_BDT: Tensor, state_BHJVM: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(outputs [B, D, T], products of keys and values [B, H, J, V, T]), both in fp32 or wider."""
        (T, J), dtype = (q_BDT.shape[-1], self.options(self.config.model).head_dim), k_BDT.dtype
        q, k, v = (x.to(dtype).unflatten(1, (-1, J)) for x in (q_BDT, k_BDT, v_BDT))
        products_BHJVT = k[:, :, :, None] * v[:, :, None]
        exponents_HM, c_HM = self._transition(dtype)
        powers_HMT = (exponents_HM[..., None] * torch.arange(T, device=q.device)).exp()
        filter_HT = 2 * torch.einsum("hm,hmt->ht", c_HM, powers_HMT).real
        mixed = long_convolution(products_BHJVT, filter_HT[:, None, None])
        mixed = mixed + self.skip.to(dtype)[:, None, None, None] * products_BHJVT
        if state_BHJVM is not None:
            first_HM = c_HM * exponents_HM.exp()
            mixed = mixed + 2 * torch.einsum("hm,hmt,bhjvm->bhjvt", first_HM, powers_HMT, state_BHJVM).real
        return (q[:, :, :, None] * mixed).sum(2).flatten(1, 2), products_BHJVT

    def _final(self, products_BHJVT: Tensor, state_BHJVM: Tensor) -> Tensor:
        """The state after all tokens: sum_t e^(A dt (T - 1 - t)) k_t v_t, and what is left of the state before."""
        T = products_BHJVT.shape[-1]
        exponents_HM, _ = self._transition(products_BHJVT.dtype)
        left_T = torch.arange(T - 1, -1, -1, device=products_BHJVT.device)
        powers_HMT = (exponents_HM[..., None] * left_T).exp()
        new = torch.einsum("hmt,bhjvt->bhjvm", powers_HMT, products_BHJVT.to(powers_HMT.dtype))
        return new + (exponents_HM * T).exp()[:, None, None] * state_BHJVM

    def _transition(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(A dt, C (e^(A dt) - 1) / A), complex [H, M]: the state space with a hold between tokens."""
        log_step, log_rate, frequency, c = (
            x.to(dtype) for x in (self.log_step, self.log_rate, self.frequency, self.c_weight)
        )
        a_HM = torch.complex(-log_rate.exp(), frequency)
        exponents_HM = a_HM * log_step.exp()[:, None]
        return exponents_HM, torch.view_as_complex(c.contiguous()) * (exponents_HM.exp() - 1) / a_HM

    @classmethod
    def check(cls, model: ModelConfig, tensor: int) -> None:
        head_dim = cls.options(model).head_dim
        if model.hidden_size % head_dim:
            raise ConfigError(
                f"h3 cannot have heads of {head_dim} channels in a width of {model.hidden_size}; change h3.head_dim in "
                f"model.mixer_options or model.hidden_size"
            )

    @classmethod
    def parameter_shapes(cls, model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        return {"qkv.weight": (3 * D, D), **_inner_shapes(model), "out_proj.weight": (D, D)}

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """The projections and what goes back, in the model's dtype; keys, products, their spectra and sums in fp32."""
        wide = model.hidden_size * (6 + 6 * cls.options(model).head_dim)
        return piece.numbers(4 * model.hidden_size) + piece.sequences * piece.tokens * wide * 4

    @classmethod
    def mixing_flops(cls, model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token: 5 N log2 N for each transform of N = 2 T numbers, two for each key and for each product.

        The filters, which all sequences share, are not counted.
        """
        products = cls.options(model).head_dim * model.hidden_size
        return 20.0 * math.log2(2 * sequence_length_tokens) * (model.hidden_size + products) + 5.0 * products

    @classmethod
    def initial(cls, name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: A = -1/2 + i pi n, steps of 0.001 to 0.1, and taps, C and skips from N(0, 1)."""
        if name == "log_rate":
            return torch.full(shape, math.log(0.5))
        if name == "frequency":
            return (math.pi * torch.arange(shape[1])).expand(shape).clone()
        if name == "log_step":
            return drawn_log_steps(shape, generator)
        if name in ("taps", "c_weight", "key_skip", "skip"):
            return torch.empty(shape).normal_(generator=generator)
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        """True for the projections alone."""
        return name.endswith(".weight")

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> H3State:
        options, D, wide = cls.options(model), model.hidden_size, torch.promote_types(dtype, torch.float32)
        J, N = options.head_dim, options.state_dim
        return H3State(
            torch.zeros(batch, D // J, J, J, N // 2, 2, dtype=wide, device=device),
            ConvState.zeros(batch, N, D, dtype=dtype, device=device).inputs_BhD,
        )


def _inner_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Parameters between the projections."""
    D, options = model.hidden_size, H3.options(model)
    H, M = D // options.head_dim, options.state_dim // 2
    return {
        "taps": (D, options.state_dim),
        "key_skip": (D,),
        "log_step": (H,),
        "log_rate": (H, M),
        "frequency": (H, M),
        "c_weight": (H, M, 2),
        "skip": (H,),
    }
