"""States and boundary rows that cross from one slice of a sequence to the next, with their gradients.

Both are plain all-gathers: right for any slice length, with traffic that grows with the number of ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.topology import Axis


def exclusive_prefix(state: Tensor, plan: SequencePlan) -> Tensor | None:
    """Sum of the states of earlier slices that belong to the document of this slice's first token.

    state: [B, ...], fp32 or fp64: the moments of the last document in this slice. Returns the same shape, or None with one rank.
    Summed in rank order from zero, never as "inclusive minus own", which cancels. The gradient is the exclusive suffix.
    """
    if plan.gates_BPP is None:
        return None
    return _ExclusivePrefix.apply(state, plan.gates_BPP, plan.axis)


def with_halo(x_BL: Tensor, rows: int, plan: SequencePlan) -> Tensor:
    """Put the `rows` tokens before this slice in front of it: [B, L, ...] -> [B, N + L, ...], N = plan.halo_rows(rows).

    They may come from several slices. Gradients of halo rows go back to the rank that owns them and are added there.
    """
    return x_BL if plan.axis.size == 1 or rows == 0 else _Halo.apply(x_BL, rows, plan)


class _ExclusivePrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, gates_BPP: Tensor, axis: Axis) -> Tensor:
        ctx.gates_BPP, ctx.axis = gates_BPP, axis
        return _gated_sum(_all_gather(state, axis), gates_BPP[:, axis.rank, :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gated_sum(_all_gather(grads[0], ctx.axis), ctx.gates_BPP[:, :, ctx.axis.rank]), None, None


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BL: Tensor, rows: int, plan: SequencePlan) -> Tensor:
        ctx.tail, ctx.plan = min(rows, plan.length), plan
        tails = _all_gather(x_BL[:, -ctx.tail :], plan.axis)
        earlier = torch.cat(tails[: plan.axis.rank], dim=1) if plan.axis.rank else x_BL[:, :0]
        ctx.halo = plan.halo_rows(rows)
        return torch.cat([earlier[:, earlier.shape[1] - ctx.halo :], x_BL], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad, axis = grads[0], ctx.plan.axis
        # Gradients of all tails laid out [P, tail]; this rank has some for the rows just before its own slice.
        tails = grad.new_zeros((grad.shape[0], axis.size * ctx.tail, *grad.shape[2:]))
        end = axis.rank * ctx.tail
        tails[:, end - ctx.halo : end] = grad[:, : ctx.halo]
        dist.all_reduce(tails, group=axis.group)
        grad_x = grad[:, ctx.halo :].clone()
        grad_x[:, -ctx.tail :] += tails[:, end : end + ctx.tail]
        return grad_x, None, None


def _all_gather(x: Tensor, axis: Axis) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return parts


def _gated_sum(parts: list[Tensor], gates_BP: Tensor) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part, gate_B in zip(parts, gates_BP.unbind(1), strict=True):
        total += part * gate_B.to(part.dtype).view(-1, *([1] * (part.ndim - 1)))
    return total
