"""Softmax attention with rotary positions: over a small window, and in full (the baseline that users compare with)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.decode import WindowState, window_step
from based_megatron.kernels.rotary import apply_rotary
from based_megatron.kernels.sliding_window import full_attention, sliding_window_attention
from based_megatron.model.mixers.base import (
    Continuation,
    Mixer,
    MixerInputs,
    heads_first_batch,
    merge_heads,
    split_heads,
)
from based_megatron.parallel.sequence.exchange import with_halo


class SoftmaxAttention(Mixer):
    """Fused q | k | v projection, rotary on q and k, attention to keys of this slice and of a halo in front of it."""

    rotates = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.config.model.hidden_size
        self.qkv = self.column((width, width, width))
        self.out_proj = self.row(width)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        assert inputs.rotary is not None
        q, k, v = (heads_first_batch(part, self.heads) for part in self.qkv(x)[0].chunk(3, dim=-1))
        q, k = (apply_rotary(x, *inputs.rotary, backend=self.config.backend) for x in (q, k))
        plan, rows = inputs.plan, self.halo_rows(inputs)
        k, v, ids = with_halo(k, rows, plan), with_halo(v, rows, plan), plan.document_ids(rows)
        return self.out_proj(merge_heads(self.attend(q, k, v, ids)))[0], None

    def halo_rows(self, inputs: MixerInputs) -> int:
        """Keys wanted in front of a slice."""
        raise NotImplementedError

    def attend(self, q_BLHV: Tensor, k_BKHV: Tensor, v_BKHV: Tensor, key_document_ids_BK: Tensor | None) -> Tensor:
        """Causal attention of the last L of K = N + L positions. Returns [B, L, H, V]."""
        raise NotImplementedError


class SlidingWindowAttention(SoftmaxAttention):
    """Each query sees itself and `window_left` keys before it."""

    def halo_rows(self, inputs: MixerInputs) -> int:
        return self.config.model.window_left

    def attend(self, q_BLHV: Tensor, k_BKHV: Tensor, v_BKHV: Tensor, key_document_ids_BK: Tensor | None) -> Tensor:
        return sliding_window_attention(
            q_BLHV,
            k_BKHV,
            v_BKHV,
            window_left=self.config.model.window_left,
            key_document_ids_BS=key_document_ids_BK,
            backend=self.config.backend,
        )

    def zero_state(self, batch: int, device: torch.device) -> WindowState:
        return WindowState.zeros(
            batch,
            self.heads,
            self.config.model.window_left,
            self.head_dim,
            dtype=self.config.params_dtype,
            device=device,
        )

    def prefill(self, x: Tensor, state: WindowState, where: Continuation) -> Tensor:
        assert where.rotary is not None
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x)[0].chunk(3, dim=-1))
        q, k = (apply_rotary(x, *where.rotary, backend=self.config.backend) for x in (q, k))
        ids, length = None, x.shape[1]
        if not where.is_start:
            k_before, v_before, ids = state.last(where.position_B)
            k, v, ids = (
                torch.cat([k_before, k], dim=1),
                torch.cat([v_before, v], dim=1),
                functional.pad(ids, (0, length)),
            )
        mixed = self.attend(q, k, v, ids)
        state.store(k, v, where.position_B + length)
        return self.out_proj(mixed.flatten(-2))[0]

    def step(self, x: Tensor, state: WindowState, where: Continuation) -> Tensor:
        assert where.rotary is not None
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x)[0].chunk(3, dim=-1))
        mixed = window_step(q, k, v, *where.rotary, state, where.position_B, backend=self.config.backend)
        return self.out_proj(mixed.flatten(-2))[0]


class FullAttention(SoftmaxAttention):
    """Each query sees all keys before it. Context parallel ranks gather them: memory grows with the whole sequence."""

    def halo_rows(self, inputs: MixerInputs) -> int:
        return inputs.plan.length * (inputs.plan.axis.size - 1)

    def attend(self, q_BLHV: Tensor, k_BKHV: Tensor, v_BKHV: Tensor, key_document_ids_BK: Tensor | None) -> Tensor:
        return full_attention(q_BLHV, k_BKHV, v_BKHV, key_document_ids_BS=key_document_ids_BK)
