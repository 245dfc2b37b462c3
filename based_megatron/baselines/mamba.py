"""Mamba (arXiv 2312.00752): a state space layer of N states a channel, whose steps, inputs and readings depend on the token.

Legend: B sequences, T tokens, L tokens of this rank's slice, D hidden size, E inner width, N state dim, r rank of the steps,
K taps.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from based_megatron.baselines.initial import drawn_step_bias, drawn_tap_biases, drawn_taps
from based_megatron.baselines.state_space import StateSpaceState
from based_megatron.config import ModelConfig
from based_megatron.config.limits import Range
from based_megatron.kernels.gated_conv import silu_conv
from based_megatron.kernels.selective_scan import selective_scan
from based_megatron.model.mixers import Continuation, Mixer, MixerInputs
from based_megatron.model.mixers.facts import Shape

Count = Annotated[int, Range(at_least=1)]


@dataclass(frozen=True)
class MambaOptions:
    """Settings of Mamba."""

    state_dim: Count = 16
    """States of a channel."""
    expand: Count = 2
    """Inner width, in hidden sizes."""
    conv_taps: Count = 4
    """Taps of the short convolution."""
    step_rank: int = 0
    """Rank of the projection to the steps; 0 takes hidden_size / 16, rounded up."""


class Mamba(Mixer):
    """out_proj(y silu(z)), h_t = exp(-rate dt_t) h_(t-1) + dt_t B_t x_t, y_t = C_t h_t + skip x_t, for every channel.

    x goes through a short convolution and silu; from it come dt, B and C. These read all channels, so that tensor parallel ranks
    cannot share them.
    """

    letter, name = "M", "mamba"
    shards = False
    Options = MambaOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, dtype = self.config.model, self.config.params_dtype
        E, self.states, self.rank = _sizes(model)
        self.in_proj = self.column((E, E))
        self.taps = nn.Parameter(torch.empty(E, self.options(model).conv_taps, dtype=dtype))
        self.taps_bias = nn.Parameter(torch.empty(E, dtype=dtype))
        self.x_proj = nn.Linear(E, self.rank + 2 * self.states, bias=False, dtype=dtype)
        self.step_proj = nn.Linear(self.rank, E, bias=False, dtype=dtype)
        self.step_bias = nn.Parameter(torch.empty(E, dtype=dtype))
        self.log_rate = nn.Parameter(torch.empty(E, self.states, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(E, dtype=dtype))
        self.out_proj = self.row(E)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        # Cut before they are transposed: their gradients are then joined in the order that the projection has in memory.
        u, z = (part.transpose(0, 1) for part in self.in_proj(x)[0].chunk(2, dim=-1))
        mixed, _state = self._mix(u, z, document_ids_BT=inputs.plan.document_ids())
        return self.out_proj(mixed.transpose(0, 1).contiguous())[0], None

    def prefill(self, x: Tensor, state: StateSpaceState, where: Continuation) -> Tensor:
        u, z = self.in_proj(x)[0].chunk(2, dim=-1)
        mixed, final = self._mix(u, z, state)
        state.store(final, u)
        return self.out_proj(mixed)[0]

    def step(self, x: Tensor, state: StateSpaceState, where: Continuation) -> Tensor:
        return self.prefill(x[:, None], state, where)[:, 0]

    def _mix(
        self, u: Tensor, z: Tensor, before: StateSpaceState | None = None, document_ids_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y silu(z) [B, T, E], the state after the last token), from the inputs u of the convolution and what was before them."""
        x_BTE = silu_conv(
            u,
            self.taps,
            self.taps_bias,
            halo_BhD=None if before is None else before.inputs_BhC,
            key_document_ids_BS=document_ids_BT,
            backend=self.config.backend,
        )
        # In training tokens are outermost in memory: so projections find their rows in place.
        low, b, c = self.x_proj(x_BTE.transpose(0, 1)).split([self.rank, self.states, self.states], dim=-1)
        raw_step, b, c = (part.transpose(0, 1) for part in (self.step_proj(low), b, c))
        wide = torch.promote_types(x_BTE.dtype, torch.float32)
        return selective_scan(
            x_BTE,
            raw_step,
            -self.log_rate.to(wide).exp(),
            b,
            c,
            z,
            step_bias_C=self.step_bias,
            skip_C=self.skip,
            initial_state_BCN=None if before is None else before.state,
            document_ids_BT=document_ids_BT,
            backend=self.config.backend,
        )

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D, (E, N, r) = model.hidden_size, _sizes(model)
        return {
            "in_proj.weight": (2 * E, D),
            "taps": (E, Mamba.options(model).conv_taps),
            "taps_bias": (E,),
            "x_proj.weight": (r + 2 * N, E),
            "step_proj.weight": (E, r),
            "step_bias": (E,),
            "log_rate": (E, N),
            "skip": (E,),
            "out_proj.weight": (D, E),
        }

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token: for each state 2 for its decay, 2 to add the input, 2 to read; 2 for each tap."""
        E, N, _ = _sizes(model)
        return 6.0 * E * N + 2.0 * Mamba.options(model).conv_taps * E

    @staticmethod
    def initial(name: str, shape: Shape, model: ModelConfig, generator: torch.Generator) -> Tensor:
        """Initial values, fp32: rates 1 .. N in every channel, steps of 0.001 to 0.1, their projection U(-1 / sqrt(r), 1 / sqrt(r)), taps

        and their biases as PyTorch's of a convolution, skips 1; all else as for other mixers.
        """
        if name == "log_rate":
            return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().expand(shape).clone()
        if name == "step_bias":
            return drawn_step_bias(shape, generator)
        if name in ("taps", "step_proj.weight"):
            return drawn_taps(shape, generator)
        if name == "taps_bias":
            return drawn_tap_biases(shape, Mamba.options(model).conv_taps, generator)
        if name == "skip":
            return torch.ones(shape)
        return Mixer.initial(name, shape, model, generator)

    @staticmethod
    def decays(name: str) -> bool:
        return name.endswith(".weight") or name == "taps"

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> StateSpaceState:
        E, N, _ = _sizes(model)
        return StateSpaceState.zeros(batch, (E, N), (cls.options(model).conv_taps - 1, E), dtype, device)


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Inner width E, state dim N and rank of the steps r."""
    options = Mamba.options(model)
    return model.hidden_size * options.expand, options.state_dim, options.step_rank or -(-model.hidden_size // 16)
