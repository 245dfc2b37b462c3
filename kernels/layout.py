"""Memory layouts of what Triton kernels take and return.

Legend: B batch, T tokens, S tokens with a halo. The model's tensors are views [B, T, ..] of projections laid out [T, B, ..].
"""

from __future__ import annotations

from torch import Tensor


def strides(*tensors_BTHX: Tensor) -> list[int]:
    """Strides of batch, tokens and heads of each tensor, in elements."""
    return [stride for x in tensors_BTHX for stride in x.stride()[:3]]


def unit_last_stride(x: Tensor) -> Tensor:
    """Kernels read any strides but that of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_like(x_BTX: Tensor, *trailing: int) -> Tensor:
    """New [B, T, *trailing], by default of x's shape, with batch or tokens outermost in memory as in x.

    The next projection then finds its rows in place.
    """
    B, T = x_BTX.shape[:2]
    trailing = trailing or x_BTX.shape[2:]
    if x_BTX.stride(0) >= x_BTX.stride(1):
        return x_BTX.new_empty(B, T, *trailing)
    return x_BTX.new_empty(T, B, *trailing).transpose(0, 1)


def ids_or(stand_in: Tensor, ids_BS: Tensor | None) -> tuple[Tensor, int]:
    """Document ids and their batch stride, 0 where one row serves all; without ids the stand-in, which is not read."""
    if ids_BS is None:
        return stand_in, 0
    ids_BS = unit_last_stride(ids_BS)
    return ids_BS, 0 if ids_BS.shape[0] == 1 else ids_BS.stride(0)
