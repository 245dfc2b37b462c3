"""Vocabulary-parallel cross entropy in plain PyTorch.

Legend: T tokens, U columns of logits on this rank.

    loss = m + log(sum_u exp(z_u - m)) - z_label,   dz_u = (softmax_u - [u = label]) dloss

Each rank reduces its own columns to three numbers a token (maximum m, sum, logit of the label if it holds that column); ranks
combine those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def local_labels(labels_T: Tensor, columns: int, group: dist.ProcessGroup | None, width: int) -> Tensor:
    """The labels as columns of this rank, -1 where another rank holds it."""
    first = 0 if group is None else dist.get_rank(group) * width
    local_T = labels_T - first
    return local_T.masked_fill((local_T < 0) | (local_T >= columns), -1)


def combine(max_T: Tensor, sum_T: Tensor, label_T: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, logit of the label) over all ranks, from each rank's numbers."""
    if group is not None and dist.get_world_size(group) > 1:
        largest_T = max_T.clone()
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
        both_2T = torch.stack([sum_T * (max_T - largest_T).exp(), label_T])
        dist.all_reduce(both_2T, group=group)
        max_T, (sum_T, label_T) = largest_T, both_2T.unbind(0)
    return max_T + sum_T.log(), label_T


class VocabCrossEntropy(torch.autograd.Function):
    """(logits, labels as columns of this rank or -1, columns, group) to the loss."""

    @staticmethod
    def forward(ctx: Any, logits_TU: Tensor, local_T: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
        z_TU = logits_TU[:, :columns].to(torch.promote_types(logits_TU.dtype, torch.float32))
        held_T1 = (local_T >= 0)[:, None]
        label_T1 = z_TU.gather(1, local_T.clamp_min(0)[:, None]) * held_T1
        max_T = z_TU.amax(1)
        lse_T, label_T = combine(max_T, (z_TU - max_T[:, None]).exp_().sum(1), label_T1[:, 0], group)
        ctx.save_for_backward(logits_TU, local_T, lse_T)
        ctx.columns = columns
        return lse_T - label_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TU, local_T, lse_T = ctx.saved_tensors
        dz_TU = (logits_TU[:, : ctx.columns].to(lse_T.dtype) - lse_T[:, None]).exp_()
        held_T1 = (local_T >= 0)[:, None].to(dz_TU.dtype)
        dz_TU.scatter_add_(1, local_T.clamp_min(0)[:, None], -held_T1)
        dlogits_TU = torch.zeros_like(logits_TU)
        dlogits_TU[:, : ctx.columns] = dz_TU.mul_(dloss_T[:, None])
        return dlogits_TU, None, None, None


def vocab_cross_entropy(logits_TU: Tensor, labels_T: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
    """Loss of each token; see the package's function of this name."""
    local_T = local_labels(labels_T, columns, group, logits_TU.shape[1])
    return VocabCrossEntropy.apply(logits_TU, local_T, columns, group)
