"""Recurrences with a diagonal plus rank one transition: RWKV-7, and every delta rule.

Legend: B batch, T tokens, G chunks, C tokens of a chunk, H heads, F feature dim, V value head dim, E = V + F, M = 2C, X = F.

    S_t = diag(e^{w_t}) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T        o_t = S_t^T q_t

(RWKV-7, arXiv 2503.14456, with a = -kk and b = kk times its rate; a reads the state before it decays.) In a chunk with decays
c_i = w_1 + .. + w_i and the state S before it, the rows y_i = S_{i-1}^T a_i solve (I - A_ab) y = A_ak v + a e^{c_{i-1}} S, where
A_xy,ij = sum_f x_if y_jf e^{(decay between)_f}. The decays between two tokens are split into two factors around the middle of the chunk,
so that all pairs are one matrix product: with a log decay of -0.61 at least, as RWKV-7 has, and 64 tokens, no factor is above e^19.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.baselines.operations.chunks import Chunks, masked, states_between

CHUNK_TOKENS = 64
SMALLEST_SUM = -80.0
"""Log decays of a chunk must not add up to less: factors are at most e^40, and products of two that no token sees e^80, within fp32."""


def dplr(
    q_BTHF: Tensor,
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    a_BTHF: Tensor,
    b_BTHF: Tensor,
    log_decay_BTHF: Tensor,
    *,
    initial_state_BHFV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    return_final_state: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """Outputs of the recurrence over whole sequences, and the state after them if it is wanted.

    Args:
        log_decay_BTHF: w, at most 0; `chunk_tokens` of them in a row must add up to SMALLEST_SUM at least.
        All else is as in `delta_rule`.

    Returns: o_BTHV in the dtype of v; the state after the last token, fp32 (fp64 for fp64 inputs), or None.
    """
    T, dtype, device = q_BTHF.shape[1], torch.promote_types(v_BTHV.dtype, torch.float32), q_BTHF.device
    chunks = Chunks(T, min(chunk_tokens, T), document_ids_BT)
    C = chunks.size
    cut = (chunks.cut(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV, a_BTHF, b_BTHF, log_decay_BTHF))
    q_GBHCF, k_GBHCF, v_GBHCV, a_GBHCF, b_GBHCF, w_GBHCF = cut
    c_GBHCF = w_GBHCF.cumsum(-2)
    end_GBH1F = c_GBHCF[..., -1:, :]
    since_middle, since_middle_before = (c_GBHCF - end_GBH1F / 2).exp(), (c_GBHCF - w_GBHCF - end_GBH1F / 2).exp()
    until_middle = (end_GBH1F / 2 - c_GBHCF).exp()

    readers_GBHMF = torch.cat([q_GBHCF * since_middle, a_GBHCF * since_middle_before], dim=-2)
    written_GBHMF = torch.cat([k_GBHCF * until_middle, b_GBHCF * until_middle], dim=-2)
    visible = chunks.visible(device)
    earlier = visible & ~torch.eye(C, dtype=torch.bool, device=device)
    pairs_GBHMM = readers_GBHMF @ written_GBHMF.mT * torch.cat(
        [torch.cat([visible, visible], dim=-1), torch.cat([earlier, earlier], dim=-1)], dim=-2
    )
    from_q_GBHCM, from_a_GBHCM = pairs_GBHMM.split(C, dim=-2)
    ak_GBHCC, ab_GBHCC = from_a_GBHCM.split(C, dim=-1)
    known = ak_GBHCC @ v_GBHCV

    if chunks.count == 1 and initial_state_BHFV is None and not return_final_state:
        y_GBHCV = torch.linalg.solve_triangular(-ab_GBHCC, known, upper=False, unitriangular=True)
        return chunks.joined(from_q_GBHCM @ torch.cat([v_GBHCV, y_GBHCV], dim=-2), v_BTHV.dtype), None

    reading_q, reading_a = q_GBHCF * c_GBHCF.exp(), a_GBHCF * (c_GBHCF - w_GBHCF).exp()
    right_GBHCE = torch.cat([known, masked(reading_a, chunks.reads)], dim=-1)
    solved_GBHCE = torch.linalg.solve_triangular(-ab_GBHCC, right_GBHCE, upper=False, unitriangular=True)
    y_GBHCV, z_GBHCF = solved_GBHCE.split([v_BTHV.shape[-1], q_BTHF.shape[-1]], dim=-1)
    # All rows that are written, without the state before (v and y) and as maps of it (nothing and z).
    rows_GBHMV = torch.cat([v_GBHCV, y_GBHCV], dim=-2)
    until_end = (end_GBH1F - c_GBHCF).exp()
    writing_k, writing_b = (masked(x * until_end, chunks.writes) for x in (k_GBHCF, b_GBHCF))
    last = chunks.count if return_final_state else chunks.count - 1
    kept_GBHFF = masked(torch.diag_embed(end_GBH1F.exp().squeeze(-2)), chunks.keeps)
    states = states_between(
        kept_GBHFF[:last] + writing_b[:last].mT @ z_GBHCF[:last],
        torch.cat([writing_k, writing_b], dim=-2)[:last].mT @ rows_GBHMV[:last],
        None if initial_state_BHFV is None else initial_state_BHFV.to(dtype),
    )
    qb_GBHCC = from_q_GBHCM[..., C:]
    reading_GBHCF = masked(reading_q, chunks.reads) + qb_GBHCC @ z_GBHCF
    o_GBHCV = from_q_GBHCM @ rows_GBHMV + reading_GBHCF @ states[: chunks.count]
    return chunks.joined(o_GBHCV, v_BTHV.dtype), states[-1] if return_final_state else None


def dplr_step(
    q_BHF: Tensor,
    k_BHF: Tensor,
    v_BHV: Tensor,
    a_BHF: Tensor,
    b_BHF: Tensor,
    log_decay_BHF: Tensor,
    state_BHFV: Tensor,
) -> Tensor:
    """Output o_BHV of the next token in the dtype of v, which the state takes in first, in place."""
    q, k, v, a, b, w = (x.to(state_BHFV.dtype) for x in (q_BHF, k_BHF, v_BHV, a_BHF, b_BHF, log_decay_BHF))
    read_BH1V = a[..., None, :] @ state_BHFV
    state_BHFV *= w.exp()[..., None]
    state_BHFV += b[..., None] * read_BH1V + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state_BHFV)[..., 0, :].to(v_BHV.dtype)
