"""The delta rule, with a decay for each head or without: a state that maps keys to values and overwrites what it holds under a key.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T        o_t = S_t^T q_t

DeltaNet (arXiv 2406.06484) has g = 0, Gated DeltaNet (arXiv 2412.06464) does not. In a chunk with decays b_i = g_1 + .. + g_i and the
state S before it, the values that are written solve L u = beta (v - e^b k S), where L_ij = beta_i k_i.k_j e^{b_i - b_j} for j < i, and
1 for j = i: one triangular solve for all chunks gives u = u0 - w S. Keys may repeat, and then the powers of L - 1 grow like binomial
coefficients: L is solved, never inverted by a series.

Legend: B sequences, T tokens, H heads, N chunks of C tokens, K key dim, V value head dim, X any last dimension.
"""

import torch
from torch import Tensor

from based_megatron.baselines.operations.chunks import Chunks, compose, wide

CHUNK_TOKENS = 64


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay_BTH: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state_BHKV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    return_final_state: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """(outputs [B, T, H, V] in the dtype of v, state after the last token in fp32 or wider, or None if it is not wanted).

    k_BTHK: normalised; beta |k|^2 of 0 to 2 is stable. log_decay_BTH: at most 0, of any size. Documents start from a zero
    state; the first goes on from the initial state. Without states, a sequence of one chunk takes four products and a solve.

    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 100, 4, 8), dim=-1).unbind()
    >>> o_BTHV, state_BHKV = delta_rule(q, k, v, torch.ones(2, 100, 4), return_final_state=True)
    >>> torch.allclose(torch.einsum("bhk,bhkv->bhv", k[:, -1], state_BHKV), v[:, -1], atol=1e-5)  # the newest value is there
    True
    """
    chunks = Chunks.of(q_BTHK[..., 0, 0], chunk_tokens, document_ids_BT)
    q, k, v, beta = map(chunks.split, wide(q_BTHK * scale, k_BTHK, v_BTHV, beta_BTH[..., None]))
    hidden = chunks.hidden()
    if log_decay_BTH is None:
        decay_in, decay_out = (mask[..., None].to(q.dtype) for mask in (chunks.enters(), chunks.leaves()))
        between = (~hidden).to(q.dtype)
    else:
        b = chunks.split(log_decay_BTH[..., None].to(q.dtype)).cumsum(-2)
        # Exponents are masked before exp: those of hidden pairs may be of any size.
        between = (b - b.mT).masked_fill(hidden, -torch.inf).exp()
        decay_in = b.exp() * chunks.enters()[..., None]
        decay_out = (b[..., -1:, :] - b).exp() * chunks.leaves()[..., None]
    attention = q @ k.mT * between
    pairs = beta * (k @ k.mT * between)  # what is on the diagonal and above is not read
    if chunks.count == 1 and initial_state_BHKV is None and not return_final_state:
        return chunks.join(attention @ _solved(pairs, beta * v)).to(v_BTHV.dtype), None

    key_dim, value_dim = k.shape[-1], v.shape[-1]
    u, w = _solved(pairs, beta * torch.cat([v, k * decay_in], dim=-1)).split([value_dim, key_dim], dim=-1)
    steps = chunks.count if return_final_state else chunks.count - 1
    written = (k * decay_out)[:, :, :steps].mT
    kept = decay_in[:, :, :steps, -1:] * torch.eye(key_dim, dtype=k.dtype, device=k.device)
    states = compose(kept - written @ w[:, :, :steps], written @ u[:, :, :steps], initial_state_BHKV)
    o = attention @ u + (q * decay_in - attention @ w) @ states[:, :, : chunks.count]
    return chunks.join(o).to(v_BTHV.dtype), states[:, :, -1] if return_final_state else None


def delta_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    beta_BH: Tensor,
    log_decay_BH: Tensor | None,
    state_BHKV: Tensor,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (output, new state); what the chunked form is compared with."""
    q, k, v, beta, state = wide(q_BHK * scale, k_BHK, v_BHV, beta_BH, state_BHKV)
    if log_decay_BH is not None:
        state = state * log_decay_BH.to(state.dtype).exp()[..., None, None]
    written = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., :, None] * written[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2).to(v_BHV.dtype), state


def _solved(pairs_BHNCC: Tensor, right_BHNCX: Tensor) -> Tensor:
    """x of (1 + the part of `pairs` below the diagonal) x = right."""
    return torch.linalg.solve_triangular(pairs_BHNCC, right_BHNCX, upper=False, unitriangular=True)
