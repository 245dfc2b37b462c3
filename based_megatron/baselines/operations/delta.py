"""The delta rule, with a decay for each head or without: a state of keys to values that overwrites what it holds under a key.

Legend: B batch, T tokens, G chunks, C tokens of a chunk, H heads, F feature dim of queries and keys, V value head dim, E = V + F.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T        o_t = S_t^T q_t

(DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464.) In a chunk with decays b_i = g_1 + .. + g_i and the state S before it, the
values u that are written solve L u = beta v - beta e^b k S, with L_ij = [i = j] + beta_i k_i.k_j e^{b_i - b_j} [j < i]: one
triangular solve gives u = u0 - w S for all chunks. Keys may repeat, and then powers of L - I grow like binomial coefficients: L is
solved, never inverted by a series.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.baselines.operations.chunks import Chunks, decay, masked, states_between

CHUNK_TOKENS = 64


def delta_rule(
    q_BTHF: Tensor,
    k_BTHF: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay_BTH: Tensor | None = None,
    *,
    initial_state_BHFV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    return_final_state: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """Outputs of the delta rule over whole sequences, and the state after them if it is wanted.

    Args:
        q_BTHF, k_BTHF, v_BTHV: fp64, fp32 or bf16. Queries come scaled, and keys normalised: beta |k|^2 of 0 to 2 is stable.
        beta_BTH: how much of the old value is replaced.
        log_decay_BTH: g, at most 0, of any size; None is no decay.
        initial_state_BHFV: the state before the first token, of its document; None is zeros.
        document_ids_BT: ids that do not decrease, of every row or of one for all; nothing crosses from one to the next.

    Returns: o_BTHV in the dtype of v; the state after the last token, fp32 (fp64 for fp64 inputs), or None.
    """
    T, dtype = q_BTHF.shape[1], torch.promote_types(v_BTHV.dtype, torch.float32)
    chunks = Chunks(T, min(chunk_tokens, T), document_ids_BT)
    q_GBHCF, k_GBHCF, v_GBHCV = (chunks.cut(x, dtype) for x in (q_BTHF, k_BTHF, v_BTHV))
    beta_GBHC1 = chunks.cut(beta_BTH[..., None], dtype)
    visible = chunks.visible(q_BTHF.device)
    if log_decay_BTH is None:
        between, since_start, until_end, through = visible.to(dtype), None, None, None
    else:
        b_GBHC1 = chunks.cut(log_decay_BTH[..., None], dtype).cumsum(-2)
        between = decay(b_GBHC1 - b_GBHC1.mT, visible)
        since_start, until_end = b_GBHC1.exp(), (b_GBHC1[..., -1:, :] - b_GBHC1).exp()
        through = since_start[..., -1:, :]

    has_state = chunks.count > 1 or initial_state_BHFV is not None or return_final_state
    attention_GBHCC = q_GBHCF @ k_GBHCF.mT * between
    pairs_GBHCC = beta_GBHC1 * (k_GBHCF @ k_GBHCF.mT * between)  # only what is below the diagonal is read
    values = beta_GBHC1 * v_GBHCV
    if not has_state:
        return chunks.joined(attention_GBHCC @ _solved(pairs_GBHCC, values), v_BTHV.dtype), None

    reading_k_GBHCF = masked(_times(k_GBHCF, since_start), chunks.reads)
    both_GBHCE = _solved(pairs_GBHCC, torch.cat([values, beta_GBHC1 * reading_k_GBHCF], dim=-1))
    u_GBHCV, w_GBHCF = both_GBHCE.split([v_BTHV.shape[-1], k_BTHF.shape[-1]], dim=-1)
    writing_k_GBHCF = masked(_times(k_GBHCF, until_end), chunks.writes)
    identity_FF = torch.eye(k_BTHF.shape[-1], dtype=dtype, device=q_BTHF.device)
    kept_GBHFF = masked(_times(identity_FF.expand(chunks.count, 1, 1, -1, -1), through), chunks.keeps)
    last = chunks.count if return_final_state else chunks.count - 1
    states = states_between(
        kept_GBHFF[:last] - writing_k_GBHCF[:last].mT @ w_GBHCF[:last],
        writing_k_GBHCF[:last].mT @ u_GBHCV[:last],
        None if initial_state_BHFV is None else initial_state_BHFV.to(dtype),
    )
    reading_q_GBHCF = masked(_times(q_GBHCF, since_start), chunks.reads) - attention_GBHCC @ w_GBHCF
    o_GBHCV = attention_GBHCC @ u_GBHCV + reading_q_GBHCF @ states[: chunks.count]
    return chunks.joined(o_GBHCV, v_BTHV.dtype), states[-1] if return_final_state else None


def delta_step(
    q_BHF: Tensor,
    k_BHF: Tensor,
    v_BHV: Tensor,
    beta_BH: Tensor,
    log_decay_BH: Tensor | None,
    state_BHFV: Tensor,
) -> Tensor:
    """Output o_BHV of the next token in the dtype of v, which the state takes in first, in place."""
    q, k, v, beta = (x.to(state_BHFV.dtype) for x in (q_BHF, k_BHF, v_BHV, beta_BH))
    if log_decay_BH is not None:
        state_BHFV *= log_decay_BH.to(state_BHFV.dtype).exp()[..., None, None]
    written = beta[..., None] * (v - (k[..., None, :] @ state_BHFV)[..., 0, :])
    state_BHFV += k[..., :, None] * written[..., None, :]
    return (q[..., None, :] @ state_BHFV)[..., 0, :].to(v_BHV.dtype)


def _solved(pairs_GBHCC: Tensor, right_GBHCX: Tensor) -> Tensor:
    """x of (I + the part of `pairs` below the diagonal) x = right."""
    return torch.linalg.solve_triangular(pairs_GBHCC, right_GBHCX, upper=False, unitriangular=True)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
