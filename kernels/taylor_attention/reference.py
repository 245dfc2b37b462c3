"""Causal normalised Taylor linear attention in plain PyTorch: chunked, O(T) memory, any device, exact in fp64.

Legend: B batch, T sequence, C chunk, H heads, F feature dim, V value head dim, E = V + 1 (values and a column of ones),
R packed feature rows (see packing.py).

    w_ij = 1 + s_ij + s_ij^2 / 2,  s_ij = q_i.k_j / sqrt(F)        o_i = sum_j w_ij v_j / sum_j w_ij,  j <= i

w = ((1 + s)^2 + 1) / 2 >= 1/2, so the normaliser Z_i is at least half the number of visible keys and needs no epsilon.
Inside a chunk w is formed directly; all earlier chunks enter through the state S = sum_j packed(k_j) [v_j; 1]^T. The
backward pass recomputes everything from q, k, v, o and Z: a sweep forward rebuilds S and yields dq, a sweep in reverse
carries the adjoint of S, sum_i weighted packed(q_i) g_i^T, and yields dk and dv. States, sums and Z are fp32 (fp64 for
fp64 inputs).

Documents: a chunk reads the carried state where its tokens are in the carried document, and hands on the moments of its
last token's document. Ids that do not decrease make equality of ids the whole rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.packing import PackedLayout, packed_rows


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states, sums and normalisers for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Chunk:
    """One slice of the sequence and its document masks, as factors that broadcast over heads."""

    tokens: slice
    visible: Tensor
    """[B, 1, C, C] key j is at or before query i, in its document."""
    reads: Tensor
    """[B, 1, C, 1] the token is in the document of the carried state."""
    writes: Tensor
    """[B, 1, C, 1] the token is in the document of the chunk's last token."""
    keeps: Tensor
    """[B, 1, 1, 1] the carried document is still open at the end of the chunk."""

    def heads_first(self, x_BTHX: Tensor, dtype: torch.dtype) -> Tensor:
        """This chunk's tokens as [B, H, C, X]."""
        return x_BTHX[:, self.tokens].transpose(1, 2).to(dtype)


def _chunks(document_ids_BT: Tensor, chunk_tokens: int, dtype: torch.dtype, reverse: bool = False) -> Iterator[_Chunk]:
    T = document_ids_BT.shape[1]
    starts = range(0, T, chunk_tokens)
    for start in reversed(starts) if reverse else starts:
        tokens = slice(start, min(start + chunk_tokens, T))
        ids_BC = document_ids_BT[:, tokens]
        # Before the first chunk the carried state is the caller's, and belongs to the first token's document.
        carried_B1 = document_ids_BT[:, max(start - 1, 0), None]
        last_B1 = ids_BC[:, -1:]
        same_BCC = ids_BC[:, :, None] == ids_BC[:, None, :]
        yield _Chunk(
            tokens=tokens,
            visible=same_BCC.tril()[:, None].to(dtype),
            reads=(ids_BC == carried_B1)[:, None, :, None].to(dtype),
            writes=(ids_BC == last_B1)[:, None, :, None].to(dtype),
            keeps=(last_B1 == carried_B1)[:, :, None, None].to(dtype),
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


class TaylorAttention(torch.autograd.Function):
    """(q, k, v, initial state, document ids, chunk_tokens) to (o, final state); ids [1 or B, T], the state in fp32."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, state_BHRE: Tensor, ids_BT: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        B, T, H, F = q_BTHF.shape
        dtype = accumulation_dtype(q_BTHF.dtype)
        layout = PackedLayout.build(F, q_BTHF.device, dtype)
        o_BTHV = torch.empty_like(v_BTHV)
        z_BTH1 = torch.empty(B, T, H, 1, dtype=dtype, device=q_BTHF.device)
        initial_state_BHRE = state_BHRE
        for chunk in _chunks(ids_BT, chunk_tokens, dtype):
            q, k, v = (chunk.heads_first(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV))
            v_BHCE = _with_ones(v)
            s_BHCC = q @ k.transpose(-1, -2) * F**-0.5
            w_BHCC = (1 + s_BHCC + s_BHCC.square() / 2) * chunk.visible
            inter_BHCE = (layout.features(q) * layout.weights) @ state_BHRE
            total_BHCE = w_BHCC @ v_BHCE + inter_BHCE * chunk.reads
            z = total_BHCE[..., -1:]
            o_BTHV[:, chunk.tokens] = (total_BHCE[..., :-1] / z).transpose(1, 2)
            z_BTH1[:, chunk.tokens] = z.transpose(1, 2)
            state_BHRE = _absorb(state_BHRE, chunk, layout, k, v_BHCE)
        ctx.save_for_backward(q_BTHF, k_BTHF, v_BTHV, initial_state_BHRE, ids_BT, o_BTHV, z_BTH1)
        ctx.chunk_tokens = chunk_tokens
        ctx.set_materialize_grads(False)
        return o_BTHV, state_BHRE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHV: Tensor | None, dstate_BHRE: Tensor | None) -> tuple[Tensor | None, ...]:
        q_BTHF, k_BTHF, v_BTHV, state_BHRE, ids_BT, o_BTHV, z_BTH1 = ctx.saved_tensors
        F = q_BTHF.shape[-1]
        dtype = state_BHRE.dtype
        layout = PackedLayout.build(F, q_BTHF.device, dtype)
        do_BTHV = torch.zeros_like(o_BTHV) if do_BTHV is None else do_BTHV
        adjoint_BHRE = torch.zeros_like(state_BHRE) if dstate_BHRE is None else dstate_BHRE
        dq_BTHF, dk_BTHF, dv_BTHV = (torch.empty_like(x) for x in (q_BTHF, k_BTHF, v_BTHV))

        def recompute(chunk: _Chunk) -> tuple[Tensor, ...]:
            """Inputs of the chunk, s, and g = dL/d[numerator; normaliser], ds of the pairs inside the chunk."""
            q, k, v, o, do, z = (chunk.heads_first(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV, o_BTHV, do_BTHV, z_BTH1))
            g_BHCE = torch.cat([do, -(do * o).sum(-1, keepdim=True)], dim=-1) / z
            v_BHCE = _with_ones(v)
            s_BHCC = q @ k.transpose(-1, -2) * F**-0.5
            ds_BHCC = (g_BHCE @ v_BHCE.transpose(-1, -2)) * (1 + s_BHCC) * chunk.visible * F**-0.5
            return q, k, v_BHCE, g_BHCE, s_BHCC, ds_BHCC

        for chunk in _chunks(ids_BT, ctx.chunk_tokens, dtype):
            q, k, v_BHCE, g_BHCE, _, ds_BHCC = recompute(chunk)
            dphi_BHCR = (g_BHCE * chunk.reads) @ state_BHRE.transpose(-1, -2)
            dq = ds_BHCC @ k + layout.features_vjp(q, dphi_BHCR * layout.weights)
            dq_BTHF[:, chunk.tokens] = dq.transpose(1, 2)
            state_BHRE = _absorb(state_BHRE, chunk, layout, k, v_BHCE)

        for chunk in _chunks(ids_BT, ctx.chunk_tokens, dtype, reverse=True):
            q, k, v_BHCE, g_BHCE, s_BHCC, ds_BHCC = recompute(chunk)
            w_BHCC = (1 + s_BHCC + s_BHCC.square() / 2) * chunk.visible
            dk, dv = _key_gradients(adjoint_BHRE, layout, k, v_BHCE, chunk.writes)
            dk_BTHF[:, chunk.tokens] = (dk + ds_BHCC.transpose(-1, -2) @ q).transpose(1, 2)
            dv_BTHV[:, chunk.tokens] = (dv + w_BHCC.transpose(-1, -2) @ g_BHCE[..., :-1]).transpose(1, 2)
            phi_BHCR = layout.features(q) * layout.weights
            read_BHRE = phi_BHCR.transpose(-1, -2) @ (g_BHCE * chunk.reads)
            adjoint_BHRE = adjoint_BHRE * chunk.keeps + read_BHRE
        return dq_BTHF, dk_BTHF, dv_BTHV, adjoint_BHRE, None, None


class SegmentState(torch.autograd.Function):
    """(k, v, document ids, chunk_tokens) to the moments of the last document's tokens."""

    @staticmethod
    def forward(ctx: Any, k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor, chunk_tokens: int) -> Tensor:
        B, _, H, F = k_BTHF.shape
        dtype = accumulation_dtype(k_BTHF.dtype)
        layout = PackedLayout.build(F, k_BTHF.device, dtype)
        state_BHRE = torch.zeros(B, H, packed_rows(F), v_BTHV.shape[-1] + 1, dtype=dtype, device=k_BTHF.device)
        for chunk in _chunks(ids_BT, chunk_tokens, dtype):
            k, v = (chunk.heads_first(x, dtype) for x in (k_BTHF, v_BTHV))
            state_BHRE = _absorb(state_BHRE, chunk, layout, k, _with_ones(v))
        ctx.save_for_backward(k_BTHF, v_BTHV, ids_BT)
        ctx.chunk_tokens = chunk_tokens
        return state_BHRE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate_BHRE: Tensor) -> tuple[Tensor | None, ...]:
        k_BTHF, v_BTHV, ids_BT = ctx.saved_tensors
        dtype = dstate_BHRE.dtype
        layout = PackedLayout.build(k_BTHF.shape[-1], k_BTHF.device, dtype)
        dk_BTHF, dv_BTHV = torch.empty_like(k_BTHF), torch.empty_like(v_BTHV)
        for chunk in _chunks(ids_BT, ctx.chunk_tokens, dtype, reverse=True):
            k, v = (chunk.heads_first(x, dtype) for x in (k_BTHF, v_BTHV))
            dk, dv = _key_gradients(dstate_BHRE, layout, k, _with_ones(v), chunk.writes)
            dk_BTHF[:, chunk.tokens] = dk.transpose(1, 2)
            dv_BTHV[:, chunk.tokens] = dv.transpose(1, 2)
            dstate_BHRE = dstate_BHRE * chunk.keeps
        return dk_BTHF, dv_BTHV, None, None


def _one_document(x_BTHX: Tensor) -> Tensor:
    return torch.zeros(1, x_BTHX.shape[1], dtype=torch.int32, device=x_BTHX.device)


def _chunk_tokens(x: Tensor) -> int:
    """A GPU wants fewer, larger steps."""
    return 256 if x.is_cuda else 128


def taylor_attention(
    q_BTHF: Tensor,
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    initial_state_BHRE: Tensor | None,
    document_ids_BT: Tensor | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; see the package's function of the same name."""
    B, _, H, F = q_BTHF.shape
    dtype = accumulation_dtype(q_BTHF.dtype)
    if initial_state_BHRE is None:
        shape = (B, H, packed_rows(F), v_BTHV.shape[-1] + 1)
        initial_state_BHRE = torch.zeros(shape, dtype=dtype, device=q_BTHF.device)
    ids_BT = _one_document(q_BTHF) if document_ids_BT is None else document_ids_BT
    # Autocast would round the sums over thousands of tokens to bf16.
    with torch.autocast(q_BTHF.device.type, enabled=False):
        return TaylorAttention.apply(
            q_BTHF, k_BTHF, v_BTHV, initial_state_BHRE.to(dtype), ids_BT, chunk_tokens or _chunk_tokens(v_BTHV)
        )


def segment_state(k_BTHF: Tensor, v_BTHV: Tensor, document_ids_BT: Tensor | None, chunk_tokens: int | None) -> Tensor:
    """Moments of the last document; see the package's function of the same name."""
    ids_BT = _one_document(k_BTHF) if document_ids_BT is None else document_ids_BT
    with torch.autocast(k_BTHF.device.type, enabled=False):
        return SegmentState.apply(k_BTHF, v_BTHV, ids_BT, chunk_tokens or _chunk_tokens(v_BTHV))


def recurrent_step(q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state_BHRE: Tensor) -> tuple[Tensor, Tensor]:
    """Output and state of one more token; see the package's function of the same name."""
    dtype = state_BHRE.dtype
    layout = PackedLayout.build(q_BHF.shape[-1], q_BHF.device, dtype)
    with torch.autocast(q_BHF.device.type, enabled=False):
        v_BHE = _with_ones(v_BHV.to(dtype))
        state_BHRE = state_BHRE + layout.features(k_BHF.to(dtype)).unsqueeze(-1) * v_BHE.unsqueeze(-2)
        phi_BH1R = (layout.features(q_BHF.to(dtype)) * layout.weights).unsqueeze(-2)
        total_BHE = (phi_BH1R @ state_BHRE).squeeze(-2)
        return (total_BHE[..., :-1] / total_BHE[..., -1:]).to(v_BHV.dtype), state_BHRE
