"""Softmax attention over the whole causal past: the baseline mixer.

Legend: B batch, T queries, S keys, H heads, V head dim. The first S - T keys come before the first query: those of earlier
slices, or a decoding cache. Rotary embedding is applied by the caller.
"""

from __future__ import annotations

from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.full_attention import reference
from based_megatron.kernels.layout import check_keys

__all__ = ["full_attention"]


def full_attention(
    q_BTHV: Tensor,
    k_BSHV: Tensor,
    v_BSHV: Tensor,
    *,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Causal attention, on PyTorch's own kernels: query i attends to keys 0 .. i + (S - T).

    Arguments and documents as in `sliding_window_attention`. Without documents and with S = T no mask is formed, so
    memory is O(T) where PyTorch has a flash kernel; otherwise a boolean [T, S] mask is.

    >>> q_BTHV, k_BTHV, v_BTHV = torch.randn(3, 2, 7, 3, 8)
    >>> o_BTHV = full_attention(q_BTHV, k_BTHV, v_BTHV)
    >>> torch.allclose(o_BTHV[:, 0], v_BTHV[:, 0])  # the first token sees itself alone
    True
    """
    check_keys(q_BTHV, k_BSHV, v_BSHV, key_document_ids_BS)
    run = implementation("full_attention", backend, {"reference": reference.full_attention})
    return run(q_BTHV, k_BSHV, v_BSHV, key_document_ids_BS)
