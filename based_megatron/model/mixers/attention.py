"""Softmax attention with rotary positions: over a small window, and in full (the baseline that users compare with).

Legend: B sequences, L tokens of this rank's slice, N rows of a halo in front of it, S = N + L keys, t boundary rows, H heads of this
tensor parallel rank, V head dim, X = 3 H V columns of the fused projection.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.config import ModelConfig
from based_megatron.kernels.decode import WindowState, window_step
from based_megatron.kernels.exchange import Halo, joined_keys
from based_megatron.kernels.full_attention import full_attention
from based_megatron.kernels.rotary import apply_rotary, rotary_tables
from based_megatron.kernels.sliding_window import (
    sliding_window_attention,
    sliding_window_over_slices,
)
from based_megatron.model.mixers.base import (
    Continuation,
    Mixer,
    MixerInputs,
    heads_first_batch,
    merge_heads,
    split_heads,
)
from based_megatron.model.mixers.facts import SavedPiece, Shape, qkv_parts
from based_megatron.parallel.fp8 import takes_fp8
from based_megatron.parallel.linear import Projection
from based_megatron.parallel.sequence.carried import CarriedForm
from based_megatron.parallel.sequence.halos import HaloExchange
from based_megatron.parallel.sequence.plan import SequencePlan

WINDOW = "window"


class SoftmaxAttention(Mixer):
    """Fused q | k | v projection, rotary on q and k, attention to keys of this slice and of a halo in front of it."""

    rotates = slices = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.config.model.hidden_size
        self.qkv = self.column((width, width, width))
        self.out_proj = self.row(width)

    @property
    def takes_fp8(self) -> bool:
        return takes_fp8(self.qkv)

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        plan, rotary, rows = inputs.plan, inputs.rotary, self.look_back(inputs.plan)
        assert rotary is not None
        if plan.is_whole or not rows:
            mixed = self.attend(*self._rotated(self.qkv(x)[0], rotary), plan.document_ids())
        else:
            mixed = self.qkv(x, body=lambda project: self._mix_slice(project, plan, rotary, rows))[0]
        return self.out_proj(merge_heads(mixed))[0], None

    def _mix_slice(self, project: Projection, plan: SequencePlan, rotary: tuple[Tensor, Tensor], rows: int) -> Tensor:
        """Mix a slice whose first queries see keys of earlier slices.

        Keys and values of the boundary rows are projected first, and travel while the other rows are projected.
        """
        exchange = HaloExchange(
            plan,
            WINDOW,
            self.layer_number,
            rows,
            keep=self.keeps_received,
            renew=lambda kv: self._moved_back(kv, plan),
        )
        arriving = exchange.start(lambda: self._boundary_rows(project, rotary, exchange.boundary_rows))
        q, k, v = self._rotated(project(), rotary)
        return self.attend_slice(q, k, v, Halo(arriving, exchange), plan.document_ids(rows))

    def _rotated(self, qkv_LBX: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_first_batch(part, self.heads) for part in qkv_LBX.chunk(3, dim=-1))
        q, k = (apply_rotary(x, *rotary, backend=self.config.backend) for x in (q, k))
        return q, k, v

    def _boundary_rows(self, project: Projection, rotary: tuple[Tensor, Tensor], tokens: int) -> Tensor:
        """Keys and values of the last tokens, [B, t, 2, H, V]."""
        width = self.heads * self.head_dim
        kv = project.last_tokens(tokens, slice(width, 3 * width))
        k, v = (heads_first_batch(part, self.heads) for part in kv.chunk(2, dim=-1))
        k = apply_rotary(k, *(table[table.shape[0] - tokens :] for table in rotary), backend=self.config.backend)
        return torch.stack([k, v], dim=2)

    def _moved_back(self, kv_BN2HV: Tensor, plan: SequencePlan) -> Tensor:
        """Carried keys, rotated from their positions in the sequence before to those left of position 0 of this one."""
        model, backend = self.config.model, self.config.backend
        positions = torch.full(kv_BN2HV.shape[1:2], -plan.bounds[-1], device=kv_BN2HV.device)
        tables = rotary_tables(positions, self.head_dim, model.rotary_fraction, model.rotary_base, backend=backend)
        k, v = kv_BN2HV.unbind(2)
        return torch.stack([apply_rotary(k, *tables, backend=backend), v], dim=2)

    def look_back(self, plan: SequencePlan) -> int:
        """Keys before a slice that its queries may see."""
        raise NotImplementedError

    def attend(self, q_BLHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, key_document_ids_BS: Tensor | None) -> Tensor:
        """Causal attention of the last L of S positions. Returns [B, L, H, V]."""
        raise NotImplementedError

    def attend_slice(
        self, q_BLHV: Tensor, k_BLHV: Tensor, v_BLHV: Tensor, halo: Halo, key_document_ids_BS: Tensor | None
    ) -> Tensor:
        """`attend` where the keys and values before the slice are a halo [B, N, 2, H, V] on its way; S = N + L."""
        raise NotImplementedError

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """The fused projection, whose values are a view of it, rotated q and k, the outputs, and the log sums of exponentials."""
        sums_bytes = piece.sequences * piece.tokens * (model.num_heads // piece.tensor) * 4
        return piece.numbers(6 * model.hidden_size) + sums_bytes

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        return {"qkv.weight": (3 * D, D), "out_proj.weight": (D, D)}

    @classmethod
    def hf_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        D = model.hidden_size
        return qkv_parts("{}_proj.weight", (D, D, D), D) if name == "qkv.weight" else {"o_proj.weight": (D, D)}


class SlidingWindowAttention(SoftmaxAttention):
    """Each query sees itself and `window_left` keys before it."""

    letter, name, hf_name = "S", "sliding_window", "sliding_attention"
    carries = True
    released_slot, released_target = "alt_mixer_2", "based.models.mixers.slide_attention.SlidingAttention"

    @staticmethod
    def carried_forms(model: ModelConfig, dtype: torch.dtype) -> dict[str, CarriedForm]:
        if not model.window_left:
            return {}
        shape = (model.window_left, 2, model.num_heads, model.hidden_size // model.num_heads)
        return {WINDOW: CarriedForm(shape, cut_dim=2, dtype=dtype)}

    def look_back(self, plan: SequencePlan) -> int:
        return self.config.model.window_left

    def attend(self, q_BLHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, key_document_ids_BS: Tensor | None) -> Tensor:
        return sliding_window_attention(
            q_BLHV,
            k_BSHV,
            v_BSHV,
            window_left=self.config.model.window_left,
            key_document_ids_BS=key_document_ids_BS,
            backend=self.config.backend,
        )

    def attend_slice(
        self, q_BLHV: Tensor, k_BLHV: Tensor, v_BLHV: Tensor, halo: Halo, key_document_ids_BS: Tensor | None
    ) -> Tensor:
        return sliding_window_over_slices(
            q_BLHV,
            k_BLHV,
            v_BLHV,
            halo,
            window_left=self.config.model.window_left,
            key_document_ids_BS=key_document_ids_BS,
            backend=self.config.backend,
        )

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        return _attention_flops(model, sequence_length_tokens, model.window_left)

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> WindowState:
        heads, head_dim = model.num_heads, model.hidden_size // model.num_heads
        return WindowState.zeros(batch, heads, model.window_left, head_dim, dtype=dtype, device=device)

    @classmethod
    def released_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        return {"Wqkv.weight" if name == "qkv.weight" else name: cls.parameter_shapes(model)[name]}

    @staticmethod
    def released_settings(model: ModelConfig) -> dict[str, Any]:
        return {"window_size": 2 * model.window_left, "num_heads": model.num_heads, "causal": True}

    @staticmethod
    def read_released(section: dict[str, Any]) -> dict[str, Any]:
        return {"window_left": section["window_size"] // 2}

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

    letter, name, hf_name = "A", "full_attention", "full_attention"

    def look_back(self, plan: SequencePlan) -> int:
        return plan.bounds[-1] if plan.ranks.size > 1 else 0

    def attend(self, q_BLHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, key_document_ids_BS: Tensor | None) -> Tensor:
        return full_attention(q_BLHV, k_BSHV, v_BSHV, key_document_ids_BS=key_document_ids_BS)

    def attend_slice(
        self, q_BLHV: Tensor, k_BLHV: Tensor, v_BLHV: Tensor, halo: Halo, key_document_ids_BS: Tensor | None
    ) -> Tensor:
        k_BSHV, v_BSHV = joined_keys(k_BLHV, v_BLHV, halo)
        return self.attend(q_BLHV, k_BSHV, v_BSHV, key_document_ids_BS)

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """Besides: a copy of the outputs in the order of the projection; heads padded to a multiple of 8; a mask of documents."""
        D, head_dim = model.hidden_size, model.hidden_size // model.num_heads
        total = super().saved_bytes(model, piece) + (piece.numbers(D) if piece.sequences > 1 else 0)
        if head_dim % 8:
            total += piece.numbers(4 * model.num_heads * (-(-head_dim // 8) * 8))
        if piece.documents:
            total += piece.sequences * piece.tokens**2 * piece.number_bytes
        return total

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        return _attention_flops(model, sequence_length_tokens, sequence_length_tokens)


def _attention_flops(model: ModelConfig, sequence_length_tokens: int, previous_keys: int) -> float:
    """Forward operations of a token in softmax attention: 4 for each channel and visible key.

    Keys are averaged over positions t = 1..T of a sequence: the mean of min(t, previous_keys + 1). Window and causal mask are
    applied as if the sequence were one document.
    """
    full = min(previous_keys + 1, sequence_length_tokens)
    return 4.0 * model.hidden_size * (full - full * (full - 1) / (2 * sequence_length_tokens))
