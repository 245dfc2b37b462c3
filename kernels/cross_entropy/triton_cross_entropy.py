"""Vocabulary-parallel cross entropy in Triton: reads the logits once forward; backward overwrites them with their gradient.

Legend: N tokens, C columns of logits on this rank. The maths and the exchange between ranks are those of reference.py.

C is known to the compiler: rows of an odd multiple of 8 columns (50,264) are read 16 bytes at a time only if it can see that.
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

BLOCK = 2048
WARPS = 4


@triton.jit
def _forward(
    logits_ptr, local_ptr, max_ptr, sum_ptr, label_ptr, C: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * C
    # Each lane keeps the maximum and the sum of its own columns: lanes meet once, at the end of the row. The start is
    # finite, so that lanes without columns stay free of NaN.
    largest = tl.full([BLOCK], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < COLUMNS, other=-float("inf")).to(tl.float32)
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
def _backward(logits_ptr, local_ptr, lse_ptr, dloss_ptr, C: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * C
    local = tl.load(local_ptr + token)
    lse = tl.load(lse_ptr + token)
    dloss = tl.load(dloss_ptr + token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + column, mask=column < COLUMNS, other=-float("inf")).to(tl.float32)
    dz = (tl.exp(z - lse) - tl.where(column == local, 1.0, 0.0)) * dloss
    tl.store(row_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < C)


class VocabCrossEntropy(torch.autograd.Function):
    """(logits, labels as columns of this rank or -1, columns, group) to the loss."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, local_N: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
        N, C = logits_NC.shape
        max_N, sum_N, label_N = logits_NC.new_empty(3, N, dtype=torch.float32).unbind(0)
        _forward[(N,)](logits_NC, local_N, max_N, sum_N, label_N, C, columns, BLOCK=_block(C), num_warps=WARPS)
        lse_N, label_N = combine(max_N, sum_N, label_N, group)
        ctx.save_for_backward(logits_NC, local_N, lse_N)
        ctx.columns = columns
        return lse_N - label_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NC, local_N, lse_N = ctx.saved_tensors
        N, C = logits_NC.shape
        block = _block(C)
        _backward[(N, triton.cdiv(C, block))](
            logits_NC, local_N, lse_N, dloss_N.contiguous(), C, ctx.columns, BLOCK=block, num_warps=WARPS
        )
        # A second backward pass through the same graph must raise, not read the gradient as logits.
        torch.autograd.graph.increment_version(logits_NC)
        return logits_NC, None, None, None


def _block(C: int) -> int:
    return min(BLOCK, triton.next_power_of_2(C))


def vocab_cross_entropy(logits_NC: Tensor, labels_N: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
    """Loss of each token; see the package's function of the same name."""
    local_N = local_labels(labels_N, columns, group, logits_NC.shape[1])
    return VocabCrossEntropy.apply(logits_NC.contiguous(), local_N, columns, group)
