"""Recurrences whose transition is diagonal plus rank one: RWKV-7 (arXiv 2503.14456), and every delta rule.

    S_t = diag(e^{w_t}) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T        o_t = S_t^T q_t

a reads the state before it decays. In a chunk with decays c_i = w_1 + .. + w_i and the state S before it, the rows y_i = S_{i-1}^T a_i
solve (1 - A_ab) y = A_ak v + a e^{c_{i-1}} S, where A holds products of a_i with k_j or b_j, j < i, decayed from j to i - 1. Every such
decay is split into two factors around the middle of the chunk, which makes all pairs one matrix product. RWKV-7 never decays by
more than e^-0.61 a token: over 64 tokens, factors are at most e^20.

Legend: B sequences, T tokens, H heads, N chunks of C tokens, K key dim, V value head dim.
"""

import torch
from torch import Tensor

from based_megatron.baselines.operations.chunks import Chunks, compose, wide

CHUNK_TOKENS = 64
SMALLEST_SUM = -80.0
"""Log decays of a chunk may not add up to less: products of factors, hidden ones too, are at most e^80, which is within fp32."""


def dplr(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    *,
    initial_state_BHKV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    return_final_state: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """(outputs [B, T, H, V] in the dtype of v, state after the last token in fp32 or wider, or None if it is not wanted).

    log_decay_BTHK: w, at most 0; `chunk_tokens` of them in a row must add up to SMALLEST_SUM at least. Documents start from a
    zero state; the first goes on from the initial state.

    >>> q, k, v, kk = torch.nn.functional.normalize(torch.randn(4, 2, 100, 4, 8), dim=-1).unbind()
    >>> o_BTHV, state_BHKV = dplr(q, k, v, -kk, kk, torch.full_like(k, -0.5), return_final_state=True)
    >>> o_BTHV.shape, state_BHKV.shape
    (torch.Size([2, 100, 4, 8]), torch.Size([2, 4, 8, 8]))
    """
    chunks = Chunks.of(q_BTHK[..., 0, 0], chunk_tokens, document_ids_BT)
    inputs = wide(q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK)
    q, k, v, a, b, w = map(chunks.split, inputs)
    c = w.cumsum(-2)
    before, end = c - w, c[..., -1:, :]
    to_middle = (end / 2 - c).exp()
    readers = torch.cat([q * (c - end / 2).exp(), a * (before - end / 2).exp()], dim=-2)
    written = torch.cat([k * to_middle, b * to_middle], dim=-2)
    seen = ~torch.cat([chunks.hidden(), chunks.hidden(strictly=True)], dim=-2)
    from_q, from_a = (readers @ written.mT * torch.cat([seen, seen], dim=-1)).split(chunks.size, dim=-2)
    from_a_k, from_a_b = from_a.split(chunks.size, dim=-1)
    if chunks.count == 1 and initial_state_BHKV is None and not return_final_state:
        y = torch.linalg.solve_triangular(-from_a_b, from_a_k @ v, upper=False, unitriangular=True)
        return chunks.join(from_q @ torch.cat([v, y], dim=-2)).to(v_BTHV.dtype), None

    enters, leaves = chunks.enters()[..., None], chunks.leaves()[..., None]
    right = torch.cat([from_a_k @ v, a * before.exp() * enters], dim=-1)
    solved = torch.linalg.solve_triangular(-from_a_b, right, upper=False, unitriangular=True)
    y, of_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    rows = torch.cat([v, y], dim=-2)
    decay_in, decay_out = c.exp() * enters, (end - c).exp() * leaves
    steps = chunks.count if return_final_state else chunks.count - 1
    k_out, b_out = ((x * decay_out)[:, :, :steps].mT for x in (k, b))
    states = compose(
        torch.diag_embed(decay_in[:, :, :steps, -1]) + b_out @ of_state[:, :, :steps],
        torch.cat([k_out, b_out], dim=-1) @ rows[:, :, :steps],
        initial_state_BHKV,
    )
    reading = q * decay_in + from_q[..., chunks.size :] @ of_state
    o = from_q @ rows + reading @ states[:, :, : chunks.count]
    return chunks.join(o).to(v_BTHV.dtype), states[:, :, -1] if return_final_state else None


def dplr_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    a_BHK: Tensor,
    b_BHK: Tensor,
    log_decay_BHK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (output, new state); what the chunked form is compared with."""
    q, k, v, a, b, w, state = wide(q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, log_decay_BHK, state_BHKV)
    read_BH1V = a[..., None, :] @ state
    state = w.exp()[..., None] * state + b[..., None] * read_BH1V + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2).to(v_BHV.dtype), state
