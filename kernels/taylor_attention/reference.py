"""Causal normalised linear attention of second order in plain PyTorch: chunked, O(T) memory, any device, exact in fp64.

Legend: B batch, T tokens, C tokens of a chunk, H heads, F feature dim, V value head dim, E = V + 1 (values and a column of ones),
R rows of a packed state (see packing.py), X any last dimension.

    w_ij = 1 + s_ij + s_ij^2 / 2,  s_ij = q_i.k_j / sqrt(F)        o_i = sum_j w_ij v_j / sum_j w_ij,  j <= i

w = ((1 + s)^2 + 1) / 2 >= 1/2, so the normaliser Z_i is at least half the number of visible keys and needs no epsilon.
With squares alone, w = s^2, and 1e-5 is added to Z_i.

Inside a chunk w is formed directly; all earlier chunks enter through the state S = sum_j packed(k_j) [v_j; 1]^T. The
backward pass recomputes everything from q, k, v, o and Z: a scan forward rebuilds S and yields dq, a scan in reverse
has the adjoint of S, sum_i weighted packed(q_i) g_i^T, and yields dk and dv. States, sums and Z are fp32 (fp64 for
fp64 inputs).

Documents: a chunk reads the state before it where its tokens are in that state's document, and hands on the moments of its
last token's document. Ids that do not decrease make equality of ids the whole rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from based_megatron.kernels.packing import SQUARE_EPSILON, PackedLayout, packed_rows


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states, sums and normalisers for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Schedule(NamedTuple):
    """What all steps of a call have in common."""

    chunk_tokens: int
    square: bool
    """Whether weights are s^2 alone."""


@dataclass(frozen=True)
class _Chunk:
    """The tokens of one chunk and their document masks, as factors that broadcast over heads."""

    tokens: slice
    visible: Tensor
    """[B, 1, C, C] key j is at or before query i, in its document."""
    reads: Tensor
    """[B, 1, C, 1] the token is in the document of the state before the chunk."""
    writes: Tensor
    """[B, 1, C, 1] the token is in the document of the chunk's last token."""
    keeps: Tensor
    """[B, 1, 1, 1] that document is still open at the end of the chunk."""

    def heads_first(self, x_BTHX: Tensor, dtype: torch.dtype) -> Tensor:
        """This chunk's tokens as [B, H, C, X]."""
        return x_BTHX[:, self.tokens].transpose(1, 2).to(dtype)


def _chunks(document_ids_BT: Tensor, chunk_tokens: int, dtype: torch.dtype, reverse: bool = False) -> Iterator[_Chunk]:
    T = document_ids_BT.shape[1]
    starts = range(0, T, chunk_tokens)
    for start in reversed(starts) if reverse else starts:
        tokens = slice(start, min(start + chunk_tokens, T))
        ids_BC = document_ids_BT[:, tokens]
        # Before the first chunk the state is the caller's, and belongs to the first token's document.
        before_B1 = document_ids_BT[:, max(start - 1, 0), None]
        last_B1 = ids_BC[:, -1:]
        same_BCC = ids_BC[:, :, None] == ids_BC[:, None, :]
        yield _Chunk(
            tokens=tokens,
            visible=same_BCC.tril()[:, None].to(dtype),
            reads=(ids_BC == before_B1)[:, None, :, None].to(dtype),
            writes=(ids_BC == last_B1)[:, None, :, None].to(dtype),
            keeps=(last_B1 == before_B1)[:, :, None, None].to(dtype),
        )


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


def _absorb(state_BHRE: Tensor, chunk: _Chunk, layout: PackedLayout, k_BHCF: Tensor, v_BHCE: Tensor) -> Tensor:
    moments_BHRE = layout.features(k_BHCF).transpose(-1, -2) @ (v_BHCE * chunk.writes)
    return state_BHRE * chunk.keeps + moments_BHRE


def _key_gradients(
    adjoint_BHRE: Tensor, layout: PackedLayout, k_BHCF: Tensor, v_BHCE: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor]:
    """dk and dv of the tokens that a state absorbed, from the gradient of that state."""
    dk_BHCF = layout.features_vjp(k_BHCF, v_BHCE @ adjoint_BHRE.transpose(-1, -2)) * writes
    dv_BHCV = layout.features(k_BHCF) @ adjoint_BHRE[..., :-1] * writes
    return dk_BHCF, dv_BHCV


class States(NamedTuple):
    """The one state that the reference keeps."""

    entering_BHRE: Tensor
    """The state before the sequence, or the adjoint state after it."""


@dataclass(frozen=True)
class ChunkScan:
    """A scan over the chunks in one direction. This reference keeps no states of chunks: what reads them walks over the chunks again."""

    moments: Callable[[], Tensor]
    """() -> [B, H, R, E], the state after the sequence if none enters it."""
    zeros: Tensor

    def states(self, initial_BHRE: Tensor | None) -> States:
        """The states that `attend` and the gradients read, given the one that enters."""
        return States(self.zeros if initial_BHRE is None else initial_BHRE)


def scan_keys(k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, schedule: Schedule) -> ChunkScan:
    """The scan over the keys, from left to right: sum_j packed(k_j) [v_j; 1] over the last token's document."""
    zeros = _zero_state(k_BTHF, v_BTHV, schedule)

    def moments() -> Tensor:
        layout, state_BHRE = _layout(k_BTHF, schedule), zeros
        for chunk in _chunks(_ids(k_BTHF, ids_BT), schedule.chunk_tokens, zeros.dtype):
            k, v = (chunk.heads_first(x, zeros.dtype) for x in (k_BTHF, v_BTHV))
            state_BHRE = _absorb(state_BHRE, chunk, layout, k, _with_ones(v))
        return state_BHRE

    return ChunkScan(moments, zeros)


def scan_queries(
    q_BTHF: Tensor, g_BTHV: Tensor, gz_BTH1: Tensor, ids_BT: Tensor | None, schedule: Schedule
) -> ChunkScan:
    """The scan over the queries, from right to left: sum_i weighted packed(q_i) [g_i; gz_i] over the first token's document."""
    zeros = _zero_state(q_BTHF, g_BTHV, schedule)

    def moments() -> Tensor:
        layout, adjoint_BHRE = _layout(q_BTHF, schedule), zeros
        for chunk in _chunks(_ids(q_BTHF, ids_BT), schedule.chunk_tokens, zeros.dtype, reverse=True):
            q, g, gz = (chunk.heads_first(x, zeros.dtype) for x in (q_BTHF, g_BTHV, gz_BTH1))
            adjoint_BHRE = _read_back(adjoint_BHRE, chunk, layout, q, torch.cat([g, gz], dim=-1))
        return adjoint_BHRE

    return ChunkScan(moments, zeros)


def attend(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None, states: States, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Outputs o_BTHV and normalisers z_BTH1, given the state before the sequence."""
    (state_BHRE,) = states
    dtype, layout = state_BHRE.dtype, _layout(q_BTHF, schedule)
    o_BTHV = torch.empty_like(v_BTHV)
    z_BTH1 = torch.empty(*q_BTHF.shape[:3], 1, dtype=dtype, device=q_BTHF.device)
    for chunk in _chunks(_ids(q_BTHF, ids_BT), schedule.chunk_tokens, dtype):
        q, k, v = (chunk.heads_first(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV))
        v_BHCE = _with_ones(v)
        w_BHCC = _weights(_scores(q, k), schedule) * chunk.visible
        inter_BHCE = (layout.features(q) * layout.weights) @ state_BHRE
        total_BHCE = w_BHCC @ v_BHCE + inter_BHCE * chunk.reads
        z = total_BHCE[..., -1:] + (SQUARE_EPSILON if schedule.square else 0)
        o_BTHV[:, chunk.tokens] = (total_BHCE[..., :-1] / z).transpose(1, 2)
        z_BTH1[:, chunk.tokens] = z.transpose(1, 2)
        state_BHRE = _absorb(state_BHRE, chunk, layout, k, v_BHCE)
    return o_BTHV, z_BTH1


def smallest_normaliser(z_BTH1: Tensor) -> Tensor:
    """The smallest of the normalisers that `attend` returns, a scalar."""
    return z_BTH1.amin()


def output_gradients(do_BTHV: Tensor, o_BTHV: Tensor, z_BTH1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to the numerators, g_BTHV = do / Z, and to the normalisers, gz_BTH1 = -g.o."""
    g_BTHV = do_BTHV.to(z_BTH1.dtype) / z_BTH1
    return g_BTHV, -(g_BTHV * o_BTHV).sum(-1, keepdim=True)


def no_output_gradients(v_BTHV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `output_gradients` where none comes from the outputs."""
    g_BTHV = torch.zeros_like(v_BTHV, dtype=accumulation_dtype(v_BTHV.dtype))
    return g_BTHV, g_BTHV.new_zeros(*v_BTHV.shape[:3], 1)


def query_gradients(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BTHV: Tensor, gz_BTH1: Tensor, ids_BT: Tensor | None,
    states: States, schedule: Schedule,
) -> Tensor:  # fmt: skip
    """dq, given the state before the sequence."""
    (state_BHRE,) = states
    dtype, layout = state_BHRE.dtype, _layout(q_BTHF, schedule)
    dq_BTHF = torch.empty_like(q_BTHF)
    for chunk in _chunks(_ids(q_BTHF, ids_BT), schedule.chunk_tokens, dtype):
        q, k, v, g, gz = (chunk.heads_first(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV, g_BTHV, gz_BTH1))
        v_BHCE, g_BHCE = _with_ones(v), torch.cat([g, gz], dim=-1)
        dphi_BHCR = (g_BHCE * chunk.reads) @ state_BHRE.transpose(-1, -2)
        dq = _score_gradients(g_BHCE, v_BHCE, _scores(q, k), chunk, q.shape[-1], schedule) @ k
        dq_BTHF[:, chunk.tokens] = (dq + layout.features_vjp(q, dphi_BHCR * layout.weights)).transpose(1, 2)
        state_BHRE = _absorb(state_BHRE, chunk, layout, k, v_BHCE)
    return dq_BTHF


def key_gradients(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, g_BTHV: Tensor, gz_BTH1: Tensor, ids_BT: Tensor | None,
    adjoints: States, schedule: Schedule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv, given the adjoint state after the sequence."""
    (adjoint_BHRE,) = adjoints
    dtype, layout = adjoint_BHRE.dtype, _layout(q_BTHF, schedule)
    dk_BTHF, dv_BTHV = torch.empty_like(k_BTHF), torch.empty_like(v_BTHV)
    for chunk in _chunks(_ids(q_BTHF, ids_BT), schedule.chunk_tokens, dtype, reverse=True):
        q, k, v, g, gz = (chunk.heads_first(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV, g_BTHV, gz_BTH1))
        v_BHCE, g_BHCE, s_BHCC = _with_ones(v), torch.cat([g, gz], dim=-1), _scores(q, k)
        ds_BHCC = _score_gradients(g_BHCE, v_BHCE, s_BHCC, chunk, q.shape[-1], schedule)
        w_BHCC = _weights(s_BHCC, schedule) * chunk.visible
        dk, dv = _key_gradients(adjoint_BHRE, layout, k, v_BHCE, chunk.writes)
        dk_BTHF[:, chunk.tokens] = (dk + ds_BHCC.transpose(-1, -2) @ q).transpose(1, 2)
        dv_BTHV[:, chunk.tokens] = (dv + w_BHCC.transpose(-1, -2) @ g).transpose(1, 2)
        adjoint_BHRE = _read_back(adjoint_BHRE, chunk, layout, q, g_BHCE)
    return dk_BTHF, dv_BTHV


def _scores(q_BHCF: Tensor, k_BHCF: Tensor) -> Tensor:
    return q_BHCF @ k_BHCF.transpose(-1, -2) * q_BHCF.shape[-1] ** -0.5


def _weights(s_BHCC: Tensor, schedule: Schedule) -> Tensor:
    return s_BHCC.square() if schedule.square else 1 + s_BHCC + s_BHCC.square() / 2


def _score_gradients(
    g_BHCE: Tensor, v_BHCE: Tensor, s_BHCC: Tensor, chunk: _Chunk, feature_dim: int, schedule: Schedule
) -> Tensor:
    """Gradients to q.k of the pairs inside a chunk."""
    dw_BHCC = g_BHCE @ v_BHCE.transpose(-1, -2)
    slope_BHCC = 2 * s_BHCC if schedule.square else 1 + s_BHCC
    return dw_BHCC * slope_BHCC * chunk.visible * feature_dim**-0.5


def _read_back(adjoint_BHRE: Tensor, chunk: _Chunk, layout: PackedLayout, q_BHCF: Tensor, g_BHCE: Tensor) -> Tensor:
    """The adjoint of the state before a chunk, from that of the state after it."""
    phi_BHCR = layout.features(q_BHCF) * layout.weights
    return adjoint_BHRE * chunk.keeps + phi_BHCR.transpose(-1, -2) @ (g_BHCE * chunk.reads)


def schedule(chunk_tokens: int | None, *inputs: Tensor, square: bool = False) -> Schedule:
    """A schedule with chunks of so many tokens. A GPU wants fewer, larger steps."""
    return Schedule(chunk_tokens or (256 if inputs[0].is_cuda else 128), square)


def _ids(x_BTHX: Tensor, ids_BT: Tensor | None) -> Tensor:
    return torch.zeros(1, x_BTHX.shape[1], dtype=torch.int32, device=x_BTHX.device) if ids_BT is None else ids_BT


def _layout(x_BTHF: Tensor, schedule: Schedule) -> PackedLayout:
    return PackedLayout.build(x_BTHF.shape[-1], x_BTHF.device, accumulation_dtype(x_BTHF.dtype), square=schedule.square)


def _zero_state(x_BTHF: Tensor, y_BTHV: Tensor, schedule: Schedule) -> Tensor:
    B, _, H, F = x_BTHF.shape
    shape = (B, H, packed_rows(F, schedule.square), y_BTHV.shape[-1] + 1)
    return torch.zeros(shape, dtype=accumulation_dtype(x_BTHF.dtype), device=x_BTHF.device)
