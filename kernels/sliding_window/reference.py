"""Sliding window attention in plain PyTorch.

Legend: B batch, T queries, S keys (S - T of them before the first query), H heads, V head dim, W window_left; G blocks, I queries and
J = I + W keys of a block.

The window is computed in blocks: I queries against the J keys that they can see, all blocks in one batched call, so
memory is O(T J) with I close to W.
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
    """Attention to the last window_left keys and the own one; see the package's function of this name."""
    B, T, H, V = q_BTHV.shape
    S = k_BSHV.shape[1]
    W = min(window_left, S - 1)
    I = min(max(W, MIN_BLOCK_TOKENS), T)
    G = -(-T // I)
    left, right = W - (S - T), G * I - T

    ids_BS = q_BTHV.new_zeros(1, S, dtype=torch.int32) if key_document_ids_BS is None else key_document_ids_BS
    key_ids_BGJ = functional.pad(ids_BS, (left, right), value=-1).unfold(1, I + W, I)
    query_ids_BGI = key_ids_BGJ[:, :, W:]
    offset_IJ = torch.arange(I + W, device=q_BTHV.device) - torch.arange(I, device=q_BTHV.device)[:, None]
    same_BGIJ = (query_ids_BGI[..., :, None] == key_ids_BGJ[..., None, :]) & (key_ids_BGJ >= 0)[..., None, :]
    # The own key stays visible even to padding: a row without keys would put NaN into the gradients.
    visible_BGIJ = same_BGIJ & (offset_IJ >= 0) & (offset_IJ <= W) | (offset_IJ == W)

    q_GHIV = _pad_tokens(q_BTHV, 0, right).reshape(B * G, I, H, V).transpose(1, 2)
    k_GHJV, v_GHJV = (
        _pad_tokens(x, left, right).unfold(1, I + W, I).transpose(-1, -2).reshape(B * G, H, I + W, V)
        for x in (k_BSHV, v_BSHV)
    )
    mask_G1IJ = visible_BGIJ.expand(B, G, I, I + W).reshape(B * G, 1, I, I + W)
    o_GHIV = functional.scaled_dot_product_attention(q_GHIV, k_GHJV, v_GHJV, attn_mask=mask_G1IJ)
    return o_GHIV.transpose(1, 2).reshape(B, G * I, H, V)[:, :T]
