"""Linear attention of second order, s = q.k / sqrt(F): Based's weights 1 + s + s^2 / 2, or ReBased's s^2; normalised.

Legend: B sequences, L tokens of this rank's slice, H heads of this tensor parallel rank, F feature dim, V value head dim,
R rows of a packed state, E = V + 1.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from based_megatron.config import ModelConfig
from based_megatron.errors import CheckpointError
from based_megatron.kernels.decode import TaylorState, taylor_step
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import (
    finish_sliced_attention,
    start_sliced_attention,
    taylor_attention,
    taylor_moments,
)
from based_megatron.kernels.taylor_attention.attention import Watch
from based_megatron.kernels.taylor_attention.sizes import saved_state_numbers
from based_megatron.model.mixers.base import (
    Continuation,
    Mixer,
    MixerInputs,
    heads_first_batch,
    merge_heads,
    split_heads,
)
from based_megatron.model.mixers.facts import SavedPiece, Shape, qkv_parts
from based_megatron.model.norm import HeadNorm
from based_megatron.parallel.fp8 import takes_fp8
from based_megatron.parallel.linear import Projection
from based_megatron.parallel.sequence.carried import CarriedForm
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.states import STATE, StateExchange

PREFIX_WEIGHT = "prefix_kv.weight"
RELEASED_FEATURES = "based.models.mixers.linear_attention.TaylorExp"


class TaylorLinearAttention(Mixer):
    """Fused q | k | v projection and Taylor attention, without positions and biases.

    ReBased (arXiv 2402.10644) takes squares of queries and keys that are normed, scaled and shifted first. Its scales and shifts
    are those of a layer norm, one of each for every feature of every head.

    JRT (arXiv 2407.05483) adds second keys and values of the first tokens, the prefix, which all tokens see:

        o_i = (sum_j w(q_i, k_j) v_j + sum_p w(q_i, k'_p) v'_p) / (the same with v = 1),  j <= i, all p of the prefix

    Heads are independent: tensor parallel ranks exchange nothing between the projections.
    """

    letter, name, hf_name = "L", "linear_attention", "linear_attention"
    slices = carries = True
    released_slot, released_target = "alt_mixer", "based.models.mixers.linear_attention.LinearAttention"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.config.model
        rows = _qkv_rows(model)
        self.local_parts = [size // self.group.size() for size in rows]
        self.qkv = self.column(rows)
        self.out_proj = self.row(model.hidden_size)
        self.square = _is_square(model)
        if model.prefix_tokens:
            prefix_rows = _prefix_rows(model)
            self.prefix_parts = [size // self.group.size() for size in prefix_rows]
            self.prefix_kv = self.column(prefix_rows)
        if self.square:
            self.q_norm, self.k_norm = (HeadNorm(self.config, self.heads, model.feature_dim) for _ in range(2))

    @property
    def takes_fp8(self) -> bool:
        return takes_fp8(self.qkv) and not self.config.model.prefix_tokens

    def forward(self, x: Tensor, attention_mask: None = None, *, inputs: MixerInputs, **_: Any) -> tuple[Tensor, None]:
        if inputs.plan.is_whole:
            q, k, v = (heads_first_batch(part, self.heads) for part in self.qkv(x)[0].split(self.local_parts, dim=-1))
            ids = inputs.plan.document_ids()
            mixed, _state = taylor_attention(
                self._queries(q),
                self._keys(k),
                v,
                initial_state_BHRV=self._prefix(x, ids) if self.config.model.prefix_tokens else None,
                document_ids_BT=ids,
                watch=self._watch(inputs),
                square=self.square,
                backend=self.config.backend,
            )
        else:
            mixed = self.qkv(x, body=lambda project: self._mix_slice(project, inputs.plan, self._watch(inputs)))[0]
        return self.out_proj(merge_heads(mixed))[0], None

    def _prefix(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """The state of the prefix of sequences [L, B, D], as far as it is of their first documents."""
        tokens = self.config.model.prefix_tokens
        # Tensor parallel ranks may each hold other tokens; all have them after the projection.
        kv = self.prefix_kv(x if self.config.sequence_parallel else x[:tokens])[0][:tokens]
        k, v = (heads_first_batch(part, self.heads) for part in kv.split(self.prefix_parts, dim=-1))
        ids = None if ids is None else ids[:, :tokens]
        return taylor_moments(self._keys(k), v, document_ids_BT=ids, square=self.square, backend=self.config.backend)

    def _watch(self, inputs: MixerInputs) -> Watch | None:
        """Records the norm of a head's state after the sequence and the smallest normaliser, in passes that are logged."""
        if not inputs.is_watched:
            return None

        def watch(state_BHRE: Tensor, smallest_normaliser: Tensor) -> None:
            inputs.recorder.record(f"smallest_normaliser/{self.layer_name}", smallest_normaliser, "min")
            if inputs.plan.is_last:
                heads_B = state_BHRE.shape[0] * state_BHRE.shape[1]
                norm = torch.linalg.vector_norm(state_BHRE) / heads_B**0.5
                inputs.recorder.record(f"state_norm/{self.layer_name}", norm, "rms")

        return watch

    def _mix_slice(self, project: Projection, plan: SequencePlan, watch: Watch | None) -> Tensor:
        """Mix a slice that reads the state before it: the moments of keys and values travel while the queries are projected."""
        of_q, of_kv = project.parts(self.local_parts[0], sum(self.local_parts[1:]))
        k, v = (heads_first_batch(part, self.heads) for part in of_kv().split(self.local_parts[1:], dim=-1))
        k = self._keys(k)
        exchange = StateExchange(plan, self.layer_number, keep=self.keeps_received)
        started = start_sliced_attention(
            k, v, exchange, document_ids_BL=plan.document_ids(), square=self.square, backend=self.config.backend
        )
        q = self._queries(heads_first_batch(of_q(), self.heads))
        return finish_sliced_attention(q, k, v, started, watch=watch)

    @staticmethod
    def carried_forms(model: ModelConfig, dtype: torch.dtype) -> dict[str, CarriedForm]:
        rows = packed_rows(model.feature_dim, _is_square(model))
        shape = (model.num_heads, rows, model.hidden_size // model.num_heads + 1)
        return {STATE: CarriedForm(shape, cut_dim=0, dtype=torch.promote_types(dtype, torch.float32))}

    @classmethod
    def empty_state(cls, model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> TaylorState:
        heads, head_dim = model.num_heads, model.hidden_size // model.num_heads
        square = _is_square(model)
        return TaylorState.zeros(batch, heads, model.feature_dim, head_dim, dtype=dtype, device=device, square=square)

    def prefill(self, x: Tensor, state: TaylorState, where: Continuation) -> Tensor:
        mixed, final = taylor_attention(
            *self._qkv(x),
            initial_state_BHRV=self._before(x, state, where),
            return_final_state=True,
            square=self.square,
            backend=self.config.backend,
        )
        assert final is not None
        state.set_joined(final)
        return self.out_proj(mixed.flatten(-2))[0]

    def _before(self, x: Tensor, state: TaylorState, where: Continuation) -> Tensor | None:
        """The state that a piece of a prompt starts from: that of its prefix, which is in the first piece."""
        if not where.is_start:
            return state.joined()
        return self._prefix(x.transpose(0, 1), None) if self.config.model.prefix_tokens else None

    def step(self, x: Tensor, state: TaylorState, where: Continuation) -> Tensor:
        mixed = taylor_step(*self._qkv(x), state, backend=self.config.backend)
        return self.out_proj(mixed.flatten(-2))[0]

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x)[0].split(self.local_parts, dim=-1))
        return self._queries(q), self._keys(k), v

    def _queries(self, q: Tensor) -> Tensor:
        """Projected queries [..., H, F] in the form that the attention takes."""
        return self.q_norm(q) if self.square else q

    def _keys(self, k: Tensor) -> Tensor:
        return self.k_norm(k) if self.square else k

    @staticmethod
    def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
        D = model.hidden_size
        shapes: dict[str, Shape] = {"qkv.weight": (sum(_qkv_rows(model)), D), "out_proj.weight": (D, D)}
        if _is_square(model):
            features = (model.num_heads * model.feature_dim,)
            shapes |= {f"{norm}.{part}": features for norm in ("q_norm", "k_norm") for part in ("weight", "bias")}
        if model.prefix_tokens:
            shapes[PREFIX_WEIGHT] = (sum(_prefix_rows(model)), D)
        return shapes

    @classmethod
    def saved_bytes(cls, model: ModelConfig, piece: SavedPiece) -> int:
        """q, k, v, the outputs, their normalisers in fp32, and the states of chunks; before the norms of ReBased, q and k in fp32."""
        heads, head_dim = model.num_heads // piece.tensor, model.hidden_size // model.num_heads
        square = _is_square(model)
        states = saved_state_numbers(piece.sequences * heads, piece.tokens, model.feature_dim, head_dim, square)
        vectors_bytes = piece.numbers(sum(_qkv_rows(model)) + model.hidden_size)
        if model.prefix_tokens:
            prefix = dataclasses.replace(piece, tokens=min(model.prefix_tokens, piece.tokens))
            vectors_bytes += prefix.numbers(sum(_prefix_rows(model)))
        # Of each norm: its input, mean and deviation, and its output before it is scaled.
        norms = 2 * (2 * model.feature_dim + 2) if square else 0
        fp32_bytes = piece.sequences * piece.tokens * heads * (1 + norms) * 4
        return vectors_bytes + fp32_bytes + states * piece.number_bytes

    @staticmethod
    def mixing_flops(model: ModelConfig, sequence_length_tokens: int) -> float:
        """Forward operations of a token in the recurrent form, with the 1 + F + F^2 unpacked features of Based, or F^2 of ReBased, a head.

        Adding phi(k) v to the state and reading phi(q) from it cost 2 each for every state element, the normaliser being one
        more column (a kernel that packs the symmetric features, or works in chunks, does less or more than this).
        """
        features = (0 if _is_square(model) else 1 + model.feature_dim) + model.feature_dim**2
        flops = 4.0 * features * (model.hidden_size + model.num_heads)
        if model.prefix_tokens:
            # The prefix is projected and added to the state, but read with the other tokens.
            weights = sum(_prefix_rows(model)) * model.hidden_size
            share = min(model.prefix_tokens, sequence_length_tokens) / sequence_length_tokens
            flops += share * (flops / 2 + 2.0 * weights)
        return flops

    @classmethod
    def linear_weights(cls, model: ModelConfig) -> int:
        """Those of the second keys and values multiply the tokens of a prefix alone: see `mixing_flops`."""
        prefix = sum(_prefix_rows(model)) * model.hidden_size if model.prefix_tokens else 0
        return super().linear_weights(model) - prefix

    @classmethod
    def hf_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        if name == "qkv.weight":
            return qkv_parts("{}_proj.weight", _qkv_rows(model), model.hidden_size)
        if name == PREFIX_WEIGHT:
            rows = zip("kv", _prefix_rows(model), strict=True)
            return {f"prefix_{letter}_proj.weight": (n, model.hidden_size) for letter, n in rows}
        return {"o_proj.weight" if name == "out_proj.weight" else name: cls.parameter_shapes(model)[name]}

    @classmethod
    def released_parts(cls, model: ModelConfig, name: str) -> dict[str, Shape]:
        if name == "qkv.weight":
            return qkv_parts("proj_{}.weight", _qkv_rows(model), model.hidden_size)
        return super().released_parts(model, name)

    @staticmethod
    def released_settings(model: ModelConfig) -> dict[str, Any]:
        if _is_square(model) or model.prefix_tokens:
            raise CheckpointError(
                f"the released layout has no model.feature_map {model.feature_map!r} with model.prefix_tokens {model.prefix_tokens}, "
                f"only 'taylor' with 0; use --format hf"
            )
        feature_map = {"_target_": RELEASED_FEATURES, "input_dim": model.feature_dim}
        return {
            "l_max": 2048,
            "feature_dim": model.feature_dim,
            "num_heads": model.num_heads,
            "feature_map": feature_map,
        }

    @staticmethod
    def read_released(section: dict[str, Any]) -> dict[str, Any]:
        target = section["feature_map"]["_target_"]
        if target != RELEASED_FEATURES:
            raise CheckpointError(
                f"config.json has alt_mixer.feature_map._target_ {target!r}, but only {RELEASED_FEATURES} is known here"
            )
        return {"feature_dim": section["feature_dim"]}


def _is_square(model: ModelConfig) -> bool:
    """Whether features are squares alone."""
    return model.feature_map == "rebased"


def _prefix_rows(model: ModelConfig) -> tuple[int, int]:
    """Rows of the fused k | v weight of the prefix."""
    return _qkv_rows(model)[1:]


def _qkv_rows(model: ModelConfig) -> tuple[int, int, int]:
    """Rows of the fused q | k | v weight."""
    features = model.num_heads * model.feature_dim
    return features, features, model.hidden_size
