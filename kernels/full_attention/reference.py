"""Causal attention over the whole past in plain PyTorch.

Legend: B batch, T queries, S keys (S - T of them before the first query), H heads, V head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def full_attention(q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, key_document_ids_BS: Tensor | None) -> Tensor:
    """Causal attention to all earlier keys; see the package's function of this name."""
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
