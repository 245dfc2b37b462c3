"""The attention-free averages of RWKV-4: values weighted by e^key, fading with their distance, and a bonus for the token itself.

Legend: B batch, T tokens, C channels, X = 2, the weighted values and the weights.

    y_t = (sum_{j<t} e^{(t-1-j) w + k_j} v_j + e^{u + k_t} v_t) / (sum_{j<t} e^{(t-1-j) w + k_j} + e^{u + k_t})

(RWKV, arXiv 2305.13048, with w below 0.) Sums are relative to e^{m_t}, where m_t = max(m_{t-1} + w, k_t) is their largest exponent,
so that keys of any size neither overflow nor vanish; y does not depend on m, which therefore has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.baselines.operations.decayed_sums import decayed_sums


def wkv(
    k_BTC: Tensor,
    v_BTC: Tensor,
    bonus_C: Tensor,
    log_decay_C: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Averages of all tokens so far, and the state after the last.

    Args:
        k_BTC, v_BTC: fp64, fp32 or bf16; keys of any size.
        bonus_C, log_decay_C: u and w of each channel.
        initial_state: (m_BC, sums_BCX) before the first token, of its document; None, or sums of zeros, is nothing.
        document_ids_BT: ids that do not decrease, of every row or of one for all; nothing crosses from one to the next.

    Returns: y_BTC in the dtype of v; (m_BC, sums_BCX), fp32 or wider.
    """
    dtype = torch.promote_types(v_BTC.dtype, torch.float32)
    k, v, u, w = (x.to(dtype) for x in (k_BTC, v_BTC, bonus_C, log_decay_C))
    starts = None if document_ids_BT is None else document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    before_m_BC, before_sums_BCX = _before(initial_state, k)
    with torch.no_grad():
        m = _largest_exponents(k, w, before_m_BC, document_ids_BT)
        m_before = torch.cat([before_m_BC[:, None], m[:, :-1]], dim=1)
        if starts is not None:
            m_before[:, 1:].masked_fill_(starts[..., None], -torch.inf)
        largest = torch.maximum(m_before, u + k)
    faded = (w + m_before - m).exp()
    added_BTCX = (k - m).exp()[..., None] * _with_ones(v)
    first_BTCX = added_BTCX[:, :1] + (faded[:, :1, :, None] * before_sums_BCX[:, None])
    sums_BTCX = decayed_sums(faded[..., None], torch.cat([first_BTCX, added_BTCX[:, 1:]], dim=1))
    sums_before_BTCX = torch.cat([before_sums_BCX[:, None], sums_BTCX[:, :-1]], dim=1)
    total_BTCX = (m_before - largest).exp()[..., None] * sums_before_BTCX
    total_BTCX = total_BTCX + (u + k - largest).exp()[..., None] * _with_ones(v)
    return (total_BTCX[..., 0] / total_BTCX[..., 1]).to(v_BTC.dtype), (m[:, -1], sums_BTCX[:, -1])


def _before(state: tuple[Tensor, Tensor] | None, k_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """(m_BC, sums_BCX) before the first token. Sums of zeros have no largest exponent, whatever the state says."""
    if state is None:
        nothing_BC = k_BTC[:, 0].detach()
        return torch.full_like(nothing_BC, -torch.inf), torch.zeros_like(nothing_BC)[..., None].repeat(1, 1, 2)
    m_BC, sums_BCX = (x.to(k_BTC.dtype) for x in state)
    return m_BC.detach().masked_fill(sums_BCX[..., 1] == 0, -torch.inf), sums_BCX


def _largest_exponents(k_BTC: Tensor, w_C: Tensor, before_BC: Tensor, ids_BT: Tensor | None) -> Tensor:
    """m_t = max(m_{t-1} + w, k_t) within documents, by spans that double."""
    m = torch.cat([torch.maximum(k_BTC[:, :1], (before_BC + w_C)[:, None]), k_BTC[:, 1:]], dim=1)
    span = 1
    while span < m.shape[1]:
        earlier = m[:, :-span] + span * w_C
        if ids_BT is not None:
            earlier = earlier.masked_fill((ids_BT[:, span:] != ids_BT[:, :-span])[..., None], -torch.inf)
        m = torch.cat([m[:, :span], torch.maximum(m[:, span:], earlier)], dim=1)
        span *= 2
    return m


def _with_ones(v: Tensor) -> Tensor:
    return torch.stack([v, torch.ones_like(v)], dim=-1)
