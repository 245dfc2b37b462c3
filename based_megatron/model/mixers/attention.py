"""Softmax attention with rotary positions: over a small window, and in full (the baseline that users compare with)."""

from typing import Any

from torch import Tensor

from based_megatron.kernels.rotary import apply_rotary
from based_megatron.kernels.sliding_window import full_attention, sliding_window_attention
from based_megatron.model.mixers.base import Mixer, MixerInputs, heads_first_batch, merge_heads
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
        q, k = apply_rotary(q, *inputs.rotary), apply_rotary(k, *inputs.rotary)
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


class FullAttention(SoftmaxAttention):
    """Each query sees all keys before it. Context parallel ranks gather them: memory grows with the whole sequence."""

    def halo_rows(self, inputs: MixerInputs) -> int:
        return inputs.plan.length * (inputs.plan.axis.size - 1)

    def attend(self, q_BLHV: Tensor, k_BKHV: Tensor, v_BKHV: Tensor, key_document_ids_BK: Tensor | None) -> Tensor:
        return full_attention(q_BLHV, k_BKHV, v_BKHV, key_document_ids_BS=key_document_ids_BK)
