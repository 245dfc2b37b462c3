"""Vocabulary-parallel cross entropy in plain PyTorch.

Legend: N tokens, C columns of logits on this rank.

    loss = m + log(sum_c exp(z_c - m)) - z_label,   dz_c = (softmax_c - [c = label]) dloss

Each rank reduces its own columns to three numbers a token (maximum m, sum, logit of the label if it holds that column); ranks
combine those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def local_labels(labels_N: Tensor, columns: int, group: dist.ProcessGroup | None, width: int) -> Tensor:
    """The labels as columns of this rank, -1 where another rank holds it."""
    first = 0 if group is None else dist.get_rank(group) * width
    local_N = labels_N - first
    return local_N.masked_fill((local_N < 0) | (local_N >= columns), -1)


def combine(max_N: Tensor, sum_N: Tensor, label_N: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, logit of the label) over all ranks, from each rank's numbers."""
    if group is not None and dist.get_world_size(group) > 1:
        largest_N = max_N.clone()
        dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
        both_2N = torch.stack([sum_N * (max_N - largest_N).exp(), label_N])
        dist.all_reduce(both_2N, group=group)
        max_N, (sum_N, label_N) = largest_N, both_2N.unbind(0)
    return max_N + sum_N.log(), label_N


class VocabCrossEntropy(torch.autograd.Function):
    """(logits, labels as columns of this rank or -1, columns, group) to the loss."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, local_N: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
        z_NC = logits_NC[:, :columns].to(torch.promote_types(logits_NC.dtype, torch.float32))
        held_N1 = (local_N >= 0)[:, None]
        label_N1 = z_NC.gather(1, local_N.clamp_min(0)[:, None]) * held_N1
        max_N = z_NC.amax(1)
        lse_N, label_N = combine(max_N, (z_NC - max_N[:, None]).exp_().sum(1), label_N1[:, 0], group)
        ctx.save_for_backward(logits_NC, local_N, lse_N)
        ctx.columns = columns
        return lse_N - label_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_NC, local_N, lse_N = ctx.saved_tensors
        dz_NC = (logits_NC[:, : ctx.columns].to(lse_N.dtype) - lse_N[:, None]).exp_()
        held_N1 = (local_N >= 0)[:, None].to(dz_NC.dtype)
        dz_NC.scatter_add_(1, local_N.clamp_min(0)[:, None], -held_N1)
        dlogits_NC = torch.zeros_like(logits_NC)
        dlogits_NC[:, : ctx.columns] = dz_NC.mul_(dloss_N[:, None])
        return dlogits_NC, None, None, None


def vocab_cross_entropy(logits_NC: Tensor, labels_N: Tensor, columns: int, group: dist.ProcessGroup | None) -> Tensor:
    """Loss of each token; see the package's function of the same name."""
    local_N = local_labels(labels_N, columns, group, logits_NC.shape[1])
    return VocabCrossEntropy.apply(logits_NC, local_N, columns, group)
