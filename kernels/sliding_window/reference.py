"""Sliding window and full causal attention in plain PyTorch.

Legend: B batch, T local queries, S keys (S - T of them before the first query), H heads, V head dim, W window_left,
N blocks, Q queries of a block.

The window is computed in blocks: Q queries against the Q + W keys that they can see, all blocks in one batched call, so
memory is O(T (Q + W)) with Q close to W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MIN_BLOCK_TOKENS = 64
"""Smaller blocks waste less work on keys outside the window, but make the matrix products too small."""


def _pad_tokens(x_BSHV: Tensor, left: int, right: int) -> Tensor:
    """Zero tokens before and after; a negative count drops tokens."""
    return functional.pad(x_BSHV, (0, 0, 0, 0, left, right))


def sliding_window_attention(
    q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, window_left: int, key_document_ids_BS: Tensor | None
) -> Tensor:
    """Attention to the last window_left keys and the own one; see the package's function of the same name."""
    B, T, H, V = q_BTHV.shape
    S = k_BSHV.shape[1]
    W = min(window_left, S - 1)
    Q = min(max(W, MIN_BLOCK_TOKENS), T)
    N = -(-T // Q)
    left, right = W - (S - T), N * Q - T

    ids_BS = q_BTHV.new_zeros(1, S, dtype=torch.int32) if key_document_ids_BS is None else key_document_ids_BS
    key_ids_BNK = functional.pad(ids_BS, (left, right), value=-1).unfold(1, Q + W, Q)
    query_ids_BNQ = key_ids_BNK[:, :, W:]
    offset_QK = torch.arange(Q + W, device=q_BTHV.device) - torch.arange(Q, device=q_BTHV.device)[:, None]
    same_BNQK = (query_ids_BNQ[..., :, None] == key_ids_BNK[..., None, :]) & (key_ids_BNK >= 0)[..., None, :]
    # The own key stays visible even to padding: a row without keys would put NaN into the gradients.
    visible_BNQK = same_BNQK & (offset_QK >= 0) & (offset_QK <= W) | (offset_QK == W)

    q_NHQV = _pad_tokens(q_BTHV, 0, right).reshape(B * N, Q, H, V).transpose(1, 2)
    k_NHKV, v_NHKV = (
        _pad_tokens(x, left, right).unfold(1, Q + W, Q).transpose(-1, -2).reshape(B * N, H, Q + W, V)
        for x in (k_BSHV, v_BSHV)
    )
    mask_N1QK = visible_BNQK.expand(B, N, Q, Q + W).reshape(B * N, 1, Q, Q + W)
    o_NHQV = functional.scaled_dot_product_attention(q_NHQV, k_NHKV, v_NHKV, attn_mask=mask_N1QK)
    return o_NHQV.transpose(1, 2).reshape(B, N * Q, H, V)[:, :T]


def full_attention(q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, key_document_ids_BS: Tensor | None) -> Tensor:
    """Causal attention to all earlier keys; see the package's function of the same name."""
    T, S = q_BTHV.shape[1], k_BSHV.shape[1]
    q_BHTV, k_BHSV, v_BHSV = (x.transpose(1, 2) for x in (q_BTHV, k_BSHV, v_BSHV))
    if key_document_ids_BS is None and S == T:
        return functional.scaled_dot_product_attention(q_BHTV, k_BHSV, v_BHSV, is_causal=True).transpose(1, 2)
    position_S = torch.arange(S, device=q_BTHV.device)
    visible_B1TS = (position_S[S - T :, None] >= position_S)[None, None]
    if key_document_ids_BS is not None:
        query_ids_BT = key_document_ids_BS[:, S - T :]
        exists_B1S = (key_document_ids_BS >= 0)[:, None]
        same_BTS = (query_ids_BT[:, :, None] == key_document_ids_BS[:, None]) & exists_B1S
        own_TS = position_S[S - T :, None] == position_S
        visible_B1TS = visible_B1TS & (same_BTS | own_TS)[:, None]
    return functional.scaled_dot_product_attention(q_BHTV, k_BHSV, v_BHSV, attn_mask=visible_B1TS).transpose(1, 2)
