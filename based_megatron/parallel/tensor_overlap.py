"""Products of tensor parallel layers beside the messages that they need or make, under Megatron's sequence parallelism.

A column layer multiplies the rows of all ranks: it begins with its own, while those of the others are on their way. A row layer
sums its products over the ranks: the first half is on its way while the second is computed. In backward each does what the other does
in forward, and weight gradients are computed beside the last message. Rows are gathered once: backward keeps them.

Legend: L tokens of this rank's share, B sequences, P ranks, T = L B rows of a rank, t rows of a piece of them; X and Y are the widths
before and after a product.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.parallel.sequence.channel import Pending

PIECES = 2
"""Pieces of a product that is sent as it is made, where nothing else can be computed beside it: the message of the last is waited for."""


@dataclass(frozen=True)
class TensorRanks:
    """Ranks that hold a share of the rows each, and multiply all of them by a part of a weight each."""

    group: dist.ProcessGroup

    def gathered_product(self, x_LBX: Tensor, weight_XY: Tensor, bias_Y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(rows of all ranks [P L, B, X], their product with the weight [P L, B, Y]); the bias is added in the product."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        x_LBX = x_LBX.contiguous()
        rows_PTX = x_LBX.new_empty(size, x_LBX[..., 0].numel(), x_LBX.shape[-1])
        work = dist.all_gather_into_tensor(rows_PTX.flatten(0, 1), x_LBX.flatten(0, 1), group=self.group, async_op=True)
        product_PTY = rows_PTX.new_empty(*rows_PTX.shape[:2], weight_XY.shape[1])
        _multiply(x_LBX.flatten(0, 1), weight_XY, bias_Y, out_TY=product_PTY[rank])
        work.wait()
        for others in (slice(0, rank), slice(rank + 1, size)):
            if others.start < others.stop:
                out_TY = product_PTY[others].flatten(0, 1)
                _multiply(rows_PTX[others].flatten(0, 1), weight_XY, bias_Y, out_TY=out_TY)
        shape = (-1, x_LBX.shape[1])
        return rows_PTX.flatten(0, 1).unflatten(0, shape), product_PTY.flatten(0, 1).unflatten(0, shape)

    def summed_product(self, x_LBX: Tensor, weight_XY: Tensor, pieces: int = 1) -> Pending[Tensor]:
        """This rank's share [L / P, B, Y] of the products [L, B, Y] of all ranks, summed, on its way; x holds the rows of all ranks.

        pieces: each is on its way while the next is computed.
        """
        size = dist.get_world_size(self.group)
        length, batch, _ = x_LBX.shape
        x_PTX = x_LBX.reshape(size, length // size * batch, -1)
        sum_TY = x_LBX.new_empty(x_PTX.shape[1], weight_XY.shape[1])
        rows = -(-len(sum_TY) // pieces)
        under_way = [
            self._send_piece(x_PtX, weight_XY, sum_tY)
            for x_PtX, sum_tY in zip(x_PTX.split(rows, 1), sum_TY.split(rows), strict=True)
        ]

        def finish() -> Tensor:
            for work, _ in under_way:
                work.wait()
            under_way.clear()
            return sum_TY.unflatten(0, (-1, batch))

        return Pending(finish)

    def _send_piece(self, x_PtX: Tensor, weight_XY: Tensor, sum_tY: Tensor) -> tuple[Any, Tensor]:
        """Start to sum a product over the ranks; (what to wait for, the product, which must live until then)."""
        product_PtY = torch.bmm(x_PtX, weight_XY.expand(len(x_PtX), -1, -1))
        return dist.reduce_scatter_tensor(
            sum_tY, product_PtY.flatten(0, 1), group=self.group, async_op=True
        ), product_PtY


class ColumnProduct(torch.autograd.Function):
    """The rows of all ranks times this rank's part of the weight's rows."""

    @staticmethod
    def forward(ctx: Any, x_LBX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None, ranks: TensorRanks) -> Tensor:
        rows, product = ranks.gathered_product(x_LBX, weight_YX.t(), bias_Y)
        ctx.save_for_backward(rows, weight_YX)
        ctx.ranks, ctx.has_bias = ranks, bias_Y is not None
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_YX = ctx.saved_tensors
        grad = grad.contiguous()
        arriving = ctx.ranks.summed_product(grad, weight_YX)
        weight_grad = weight_gradient(grad, rows)
        bias_grad = grad.sum((0, 1)) if ctx.has_bias else None
        return arriving.wait(), weight_grad, bias_grad, None


class RowProduct(torch.autograd.Function):
    """This rank's share of the rows of a product that is summed over the ranks, each of which has a part of the weight's columns."""

    @staticmethod
    def forward(ctx: Any, x_LBX: Tensor, weight_YX: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.save_for_backward(x_LBX, weight_YX)
        ctx.ranks = ranks
        return ranks.summed_product(x_LBX, weight_YX.t(), PIECES).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_LBX, weight_YX = ctx.saved_tensors
        grads, x_grad = ctx.ranks.gathered_product(grad, weight_YX)
        return x_grad, weight_gradient(grads, x_LBX), None


def weight_gradient(grad_LBY: Tensor, x_LBX: Tensor) -> Tensor:
    """[Y, X], of a product of these inputs with a weight, from the gradient of the product."""
    return grad_LBY.flatten(0, 1).t() @ x_LBX.flatten(0, 1)


def _multiply(x_TX: Tensor, weight_XY: Tensor, bias_Y: Tensor | None, *, out_TY: Tensor) -> None:
    if bias_Y is None:
        torch.mm(x_TX, weight_XY, out=out_TY)
    else:
        torch.addmm(bias_Y, x_TX, weight_XY, out=out_TY)
