"""Softmax attention over a sliding window.

Legend: B batch, T queries, S keys, N keys of a halo, H heads, V head dim. The first S - T keys come before the first query: the
halo that a context-parallel rank received, or a decoding cache. Rotary embedding is applied by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.exchange import Halo, joined_keys
from based_megatron.kernels.layout import check_keys
from based_megatron.kernels.sliding_window import reference

__all__ = ["sliding_window_attention", "sliding_window_over_slices"]


def sliding_window_attention(
    q_BTHV: Tensor,
    k_BSHV: Tensor,
    v_BSHV: Tensor,
    *,
    window_left: int,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Query i attends to keys i + (S - T) - window_left .. i + (S - T): window_left previous keys and its own.

    Args:
        q_BTHV, k_BSHV, v_BSHV: fp64, fp32 or bf16; S >= T. Scores are scaled by V**-0.5; the softmax is fp32 or wider.
            fp64 runs in the reference whatever the backend.
        window_left: previous keys of a query; half of the released models' `window_size`.
        key_document_ids_BS: document of each key; the queries' are the last T. A query sees only its own document, and
            never an id of -1: a key that does not exist, left of the sequence start. None: all exist, one document.
        backend: a name from `resolve_backend`.

    Returns: o_BTHV in the dtype of q; gradients flow to q, k and v.

    >>> q_BTHV, k_BTHV, v_BTHV = torch.randn(3, 2, 7, 3, 8)
    >>> o_BTHV = sliding_window_attention(q_BTHV, k_BTHV, v_BTHV, window_left=2)
    >>> rest = sliding_window_attention(q_BTHV[:, 4:], k_BTHV[:, 2:], v_BTHV[:, 2:], window_left=2)  # two keys before the first query
    >>> torch.allclose(rest, o_BTHV[:, 4:], atol=1e-6)
    True
    """
    check_keys(q_BTHV, k_BSHV, v_BSHV, key_document_ids_BS)
    built = {"reference": reference.sliding_window_attention, "triton": _triton_window}
    run = implementation("sliding_window_attention", backend, built)
    return run(q_BTHV, k_BSHV, v_BSHV, window_left, key_document_ids_BS)


def sliding_window_over_slices(
    q_BTHV: Tensor,
    k_BTHV: Tensor,
    v_BTHV: Tensor,
    halo: Halo,
    *,
    window_left: int,
    key_document_ids_BS: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """`sliding_window_attention` of one slice of a sequence, whose earlier keys and values are a halo [B, N, 2, H, V] on its way.

    Document ids are those of the halo and of the slice, S = N + T. Gradients flow to q, k and v of all slices.

    >>> class Received:
    ...     # A halo that has come.
    ...     def __init__(self, rows): self.rows = rows
    ...     def wait(self): return self.rows
    >>> q_BTHV, k_BTHV, v_BTHV = torch.randn(3, 2, 7, 3, 8)
    >>> keys_and_values = torch.stack([k_BTHV, v_BTHV], dim=2)
    >>> halo = Halo(arriving=Received(keys_and_values[:, 2:4]), back=None)  # forward only: nothing goes back
    >>> own = (x[:, 4:] for x in (q_BTHV, k_BTHV, v_BTHV))
    >>> o_BTHV = sliding_window_over_slices(*own, halo, window_left=2)
    >>> torch.allclose(o_BTHV, sliding_window_attention(q_BTHV, k_BTHV, v_BTHV, window_left=2)[:, 4:], atol=1e-6)
    True
    """
    run = implementation(
        "sliding_window_attention", backend, {"reference": _reference_sliced, "triton": _triton_sliced}
    )
    return run(q_BTHV, k_BTHV, v_BTHV, window_left, key_document_ids_BS, halo)


def _triton_window(
    q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, window_left: int, key_document_ids_BS: Tensor | None
) -> Tensor:
    if q_BTHV.dtype == torch.float64:
        return reference.sliding_window_attention(q_BTHV, k_BSHV, v_BSHV, window_left, key_document_ids_BS)
    from based_megatron.kernels.sliding_window import triton_window  # Triton is there on machines with a GPU only.

    return triton_window.sliding_window_attention(q_BTHV, k_BSHV, v_BSHV, window_left, key_document_ids_BS)


def _triton_sliced(
    q_BTHV: Tensor, k_BTHV: Tensor, v_BTHV: Tensor, window_left: int, ids_BS: Tensor | None, halo: Halo
) -> Tensor:
    if q_BTHV.dtype == torch.float64:
        return _reference_sliced(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo)
    from based_megatron.kernels.sliding_window import triton_window

    return triton_window.sliding_window_attention(q_BTHV, k_BTHV, v_BTHV, window_left, ids_BS, halo)


def _reference_sliced(
    q_BTHV: Tensor, k_BTHV: Tensor, v_BTHV: Tensor, window_left: int, ids_BS: Tensor | None, halo: Halo
) -> Tensor:
    k_BSHV, v_BSHV = joined_keys(k_BTHV, v_BTHV, halo)
    return reference.sliding_window_attention(q_BTHV, k_BSHV, v_BSHV, window_left, ids_BS)
