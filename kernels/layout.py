"""Memory layouts of the tensors that Triton kernels take and return.

Legend: B batch, T tokens, H heads, S keys (a halo included), V value head dim, X any last dimension.
The model's tensors are views [B, T, ...] of projections laid out [T, B, ...].
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operand(NamedTuple):
    """A tensor [B, T, H, X], or [B, T, X] or [B, T], in the form that kernels take: where it begins, and its strides in elements.

    The last dimension of the first two is dense.
    """

    ptr: Tensor
    stride_b: int
    stride_t: int
    stride_h: int
    """0 where there are no heads."""


def operand(x: Tensor) -> Operand:
    """The operand that a tensor [B, T, H, X] or [B, T, X] is to a kernel."""
    stride_b, stride_t, stride_h = x.stride()[:3]
    return Operand(x, stride_b, stride_t, stride_h if x.ndim == 4 else 0)


def ids_operand(ids_BS: Tensor | None, stand_in: Tensor) -> Operand:
    """The operand that document ids are to a kernel; one row may serve the whole batch. Without ids, a stand-in that is not read."""
    if ids_BS is None:
        return Operand(stand_in, 0, 1, 0)
    ids_BS = unit_last_stride(ids_BS)
    return Operand(ids_BS, 0 if ids_BS.shape[0] == 1 else ids_BS.stride(0), 1, 0)


def unit_last_stride(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, as kernels need it, otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_like(x_BTX: Tensor, *trailing: int) -> Tensor:
    """A new [B, T, *trailing], by default of x's shape, with batch or tokens outermost in memory as in x.

    The next projection then finds its rows in place.
    """
    B, T = x_BTX.shape[:2]
    trailing = trailing or x_BTX.shape[2:]
    if x_BTX.stride(0) >= x_BTX.stride(1):
        return x_BTX.new_empty(B, T, *trailing)
    return x_BTX.new_empty(T, B, *trailing).transpose(0, 1)


def check_keys(q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, key_document_ids_BS: Tensor | None) -> None:
    """Assert that there are as many keys as values and ids, and no fewer than queries."""
    S = k_BSHV.shape[1]
    assert v_BSHV.shape[1] == S >= q_BTHV.shape[1], (q_BTHV.shape, k_BSHV.shape, v_BSHV.shape)
    assert key_document_ids_BS is None or key_document_ids_BS.shape[1] == S, (key_document_ids_BS.shape, S)
