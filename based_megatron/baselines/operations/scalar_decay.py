"""Linear attention whose state decays by one number for each head and token: S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = scale q_t S_t.

RetNet (arXiv 2307.08621) has constant g; the state space duality of Mamba-2 (arXiv 2405.21060) is this operation with q = C and k = B.

Legend: B sequences, T tokens, H heads, N chunks of C tokens, K key dim, V value head dim.
"""

import torch
from torch import Tensor

from based_megatron.baselines.operations.chunks import Chunks, scan_states, wide

CHUNK_TOKENS = 64


def scalar_decay(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    *,
    scale: float = 1.0,
    initial_state_BHKV: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """(outputs [B, T, H, V] in the dtype of v, state after the last token in fp32 or wider).

    log_decay_BTH: at most 0. Documents start from a zero state; the first goes on from the initial state. Within a chunk,
    b_i = g_1 + .. + g_i: o_i = sum_(j <= i) (q_i k_j) exp(b_i - b_j) v_j + exp(b_i) q_i S.

    >>> q, k, v = torch.randn(3, 2, 100, 4, 8).unbind()
    >>> o_BTHV, state_BHKV = scalar_decay(q, k, v, torch.full((2, 100, 4), -0.1), scale=8**-0.5)
    >>> o_BTHV.shape, state_BHKV.shape
    (torch.Size([2, 100, 4, 8]), torch.Size([2, 4, 8, 8]))
    """
    chunks = Chunks.of(q_BTHK[..., 0, 0], chunk_tokens, document_ids_BT)
    q, k, v, g = map(chunks.split, wide(q_BTHK * scale, k_BTHK, v_BTHV, log_decay_BTH))
    b_BHNC = g.cumsum(-1)
    # Exponents are masked before exp: those of hidden pairs may be of any size.
    pairs = (b_BHNC[..., :, None] - b_BHNC[..., None, :]).masked_fill(chunks.hidden(), -torch.inf).exp()
    decay_in = b_BHNC.exp() * chunks.enters()
    decay_out = (b_BHNC[..., -1:] - b_BHNC).exp() * chunks.leaves()
    update = (k * decay_out[..., None]).transpose(-1, -2) @ v
    before, final = scan_states(decay_in[..., -1:, None], update, initial_state_BHKV)
    o = ((q @ k.transpose(-1, -2)) * pairs) @ v + (q * decay_in[..., None]) @ before
    return chunks.join(o).to(v_BTHV.dtype), final


def scalar_decay_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, state_BHKV: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: (output, new state); what the chunked form is compared with."""
    q, k, v, g = wide(q_BHK * scale, k_BHK, v_BHV, log_decay_BH)
    state_BHKV = g.exp()[..., None, None] * state_BHKV + k[..., :, None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, state_BHKV).to(v_BHV.dtype), state_BHKV
