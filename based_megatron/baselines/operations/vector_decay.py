"""Linear attention with a decay for each key channel: S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T, o_t = scale q_t S_t.

The operation of gated linear attention (GLA, arXiv 2312.06635).

Legend: B sequences, T tokens, H heads, N chunks of C tokens, K key dim, V value head dim.
"""

import torch
from torch import Tensor

from based_megatron.baselines.operations.chunks import Chunks, scan_states, wide

CHUNK_TOKENS = 16
"""Short, because every pair of tokens in a chunk has K decays."""


def vector_decay(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float = 1.0,
    initial_state_BHKV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """(outputs [B, T, H, V] in the dtype of v, state after the last token in fp32 or wider).

    log_decay_BTHK: at most 0. Documents start from a zero state; the first goes on from the initial state. Within a chunk,
    b_i = g_1 + .. + g_i: o_i = sum_(j <= i) (sum_k q_ik k_jk exp(b_ik - b_jk)) v_j + (q_i exp(b_i)) S.

    >>> q, k, v = torch.randn(3, 2, 100, 4, 8).unbind()
    >>> o_BTHV, state_BHKV = vector_decay(q, k, v, torch.full((2, 100, 4, 8), -0.1), scale=8**-0.5)
    >>> o_BTHV.shape, state_BHKV.shape
    (torch.Size([2, 100, 4, 8]), torch.Size([2, 4, 8, 8]))
    """
    chunks = Chunks.of(q_BTHK[..., 0, 0], chunk_tokens, document_ids_BT)
    q, k, v, g = map(chunks.split, wide(q_BTHK * scale, k_BTHK, v_BTHV, log_decay_BTHK))
    b_BHNCK = g.cumsum(-2)
    # Exponents are masked before exp: those of hidden pairs may be of any size. A product of q exp(b) and k exp(-b) would overflow.
    exponents = b_BHNCK[..., :, None, :] - b_BHNCK[..., None, :, :]
    decays = exponents.masked_fill(chunks.hidden()[..., None], -torch.inf).exp()
    scores = torch.einsum("bhnik,bhnjk,bhnijk->bhnij", q, k, decays)
    decay_in = b_BHNCK.exp() * chunks.enters()[..., None]
    decay_out = (b_BHNCK[..., -1:, :] - b_BHNCK).exp() * chunks.leaves()[..., None]
    update = (k * decay_out).transpose(-1, -2) @ v
    before, final = scan_states(decay_in[..., -1, :, None], update, initial_state_BHKV)
    return chunks.join(scores @ v + (q * decay_in) @ before).to(v_BTHV.dtype), final


def vector_decay_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor, state_BHKV: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (output, new state); what the chunked form is compared with."""
    q, k, v, g = wide(q_BHK * scale, k_BHK, v_BHV, log_decay_BHK)
    state_BHKV = g.exp()[..., None] * state_BHKV + k[..., :, None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, state_BHKV).to(v_BHV.dtype), state_BHKV
