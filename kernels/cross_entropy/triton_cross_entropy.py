"""Vocabulary-parallel cross entropy in Triton: reads the logits once forward; backward overwrites them with their gradient.

Legend: T tokens, U columns of logits on this rank. The maths and the exchange between ranks are those of reference.py.

U is known to the compiler: rows of an odd multiple of 8 columns (50,264) are read 16 bytes at a time only if it can see that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.cross_entropy.reference import combine, local_labels

TILE_COLUMNS = 2048
WARPS = 4


@triton.jit
def _forward_kernel(
    logits_ptr,
    local_ptr,
    max_ptr,
    sum_ptr,
    label_ptr,
    U: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One program: one token."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * U
    # Each lane keeps the maximum and the sum of its own columns: lanes meet once, at the end of the row. The start is
    # finite, so that lanes without columns stay free of NaN.
    largest = tl.full([TILE_COLUMNS], -1e30, dtype=tl.float32)
    total = tl.zeros([TILE_COLUMNS], dtype=tl.float32)
    for start in range(0, COLUMNS, TILE_COLUMNS):
        u = start + tl.arange(0, TILE_COLUMNS)
        z = tl.load(row_ptr + u, mask=u < COLUMNS, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, z)
        total = total * tl.exp(largest - larger) + tl.exp(z - larger)
        largest = larger
    row_max = tl.max(largest, axis=0)
    row_sum = tl.sum(total * tl.exp(largest - row_max), axis=0)
    local = tl.load(local_ptr + token)
    label = tl.load(row_ptr + local, mask=local >= 0, other=0.0).to(tl.float32)
    tl.store(max_ptr + token, row_max)
    tl.store(sum_ptr + token, row_sum)
    tl.store(label_ptr + token, label)


@triton.jit
def _backward_kernel(
    logits_ptr, local_ptr, lse_ptr, dloss_ptr, U: tl.constexpr, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """One program: a tile of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * U
    local = tl.load(local_ptr + token)
    lse = tl.load(lse_ptr + token)
    dloss = tl.load(dloss_ptr + token)
    u = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    z = tl.load(row_ptr + u, mask=u < COLUMNS, other=-float("inf")).to(tl.float32)
    dz = (tl.exp(z - lse) - tl.where(u == local, 1.0, 0.0)) * dloss
    tl.store(row_ptr + u, dz.to(logits_ptr.dtype.element_ty), mask=u < U)


class VocabCrossEntropy(torch.autograd.Function):
    """(logits, labels as columns of this rank or -1, columns, group) to the loss."""

    @staticmethod
    def forward(ctx: Any, logits_TU: Tensor, local_T: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
        T, U = logits_TU.shape
        max_T, sum_T, label_T = logits_TU.new_empty(3, T, dtype=torch.float32).unbind(0)
        _forward_kernel[(T,)](
            logits_TU, local_T, max_T, sum_T, label_T, U, columns, TILE_COLUMNS=_tile_columns(U), num_warps=WARPS
        )
        lse_T, label_T = combine(max_T, sum_T, label_T, group)
        ctx.save_for_backward(logits_TU, local_T, lse_T)
        ctx.columns = columns
        return lse_T - label_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TU, local_T, lse_T = ctx.saved_tensors
        T, U = logits_TU.shape
        tile_columns = _tile_columns(U)
        _backward_kernel[(T, triton.cdiv(U, tile_columns))](
            logits_TU, local_T, lse_T, dloss_T.contiguous(), U, ctx.columns, TILE_COLUMNS=tile_columns, num_warps=WARPS
        )
        # A second backward pass through the same graph must raise, not read the gradient as logits.
        torch.autograd.graph.increment_version(logits_TU)
        return logits_TU, None, None, None


def _tile_columns(U: int) -> int:
    return min(TILE_COLUMNS, triton.next_power_of_2(U))


def vocab_cross_entropy(logits_TU: Tensor, labels_T: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
    """Loss of each token; see the package's function of this name."""
    local_T = local_labels(labels_T, columns, group, logits_TU.shape[1])
    return VocabCrossEntropy.apply(logits_TU.contiguous(), local_T, columns, group)
