"""Products of tensor parallel layers at the same time as the messages that they need or make, under Megatron's sequence parallelism.

A column layer multiplies the rows of all ranks: it begins with its own, while those of the others are on their way. A row layer
sums its products over the ranks: what is done is on its way while the rest is computed. In backward each does what the other does in
forward, and weight gradients are computed during the last message. Rows are gathered once: backward keeps them.

Legend: L tokens of this rank's share, B sequences, P ranks, T = L B rows of a rank (of all ranks, where it is alone),
X input and O output features of a product.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.parallel.gradient_sums import bias_gradient, gradient_sum, weight_gradient
from based_megatron.parallel.sequence.channel import Pending


class TensorRanks(Protocol):
    """Ranks that hold a share of the rows each, and multiply all of them by a part of a weight each."""

    size: int

    def gathering(self, x_TX: Tensor, rows_PTX: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Fill `rows` with those of all ranks. Gives (places in it, their rows): this rank's at once, the others' when they are there."""

    def product_sum(self, x_PTX: Tensor, weight_XO: Tensor, bias_O: Tensor | None = None) -> Pending[Tensor]:
        """This rank's rows [T, O] of the products of all ranks, summed, and the bias; on their way.

        They are waited for before anything else is sent.
        """


class CollectiveRanks:
    """Ranks that send by collectives: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def gathering(self, x_TX: Tensor, rows_PTX: Tensor) -> Iterator[tuple[slice, Tensor]]:
        work = dist.all_gather_into_tensor(rows_PTX.flatten(0, 1), x_TX, group=self.group, async_op=True)
        yield slice(self.rank, self.rank + 1), x_TX[None]
        work.wait()
        for others in places_of_others(self.rank, self.size):
            yield others, rows_PTX[others]

    def product_sum(self, x_PTX: Tensor, weight_XO: Tensor, bias_O: Tensor | None = None) -> Pending[Tensor]:
        product = x_PTX.flatten(0, 1) @ weight_XO
        sum_TO = product.new_empty(x_PTX.shape[1], weight_XO.shape[1])
        work = dist.reduce_scatter_tensor(sum_TO, product, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return sum_TO if bias_O is None else sum_TO.add_(bias_O)

        return Pending(finish)


def places_of_others(rank: int, size: int) -> list[slice]:
    """Places of all ranks but one, in the order of ranks."""
    return [places for places in (slice(0, rank), slice(rank + 1, size)) if places.start < places.stop]


def multiply(x_TX: Tensor, weight_XO: Tensor, bias_O: Tensor | None, *, out: Tensor) -> None:
    """The product [T, O], with the bias added in it."""
    if bias_O is None:
        torch.mm(x_TX, weight_XO, out=out)
    else:
        torch.addmm(bias_O, x_TX, weight_XO, out=out)


class ColumnProduct(torch.autograd.Function):
    """The rows of all ranks times this rank's part of the weight's rows."""

    @staticmethod
    def forward(ctx: Any, x_LBX: Tensor, weight_OX: Tensor, bias_O: Tensor | None, ranks: TensorRanks) -> Tensor:
        x_TX = x_LBX.contiguous().flatten(0, 1)
        rows_PTX = x_TX.new_empty(ranks.size, *x_TX.shape)
        product_PTO = x_TX.new_empty(ranks.size, len(x_TX), len(weight_OX))
        for places, there in ranks.gathering(x_TX, rows_PTX):
            multiply(there.flatten(0, 1), weight_OX.t(), bias_O, out=product_PTO[places].flatten(0, 1))
        ctx.save_for_backward(rows_PTX, weight_OX)
        ctx.ranks, ctx.has_bias = ranks, bias_O is not None
        ctx.of_weight, ctx.of_bias = gradient_sum(weight_OX), gradient_sum(bias_O)
        return product_PTO.view(-1, x_LBX.shape[1], len(weight_OX))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LBO: Tensor) -> tuple[Tensor | None, ...]:
        rows_PTX, weight_OX = ctx.saved_tensors
        grad_PTO = grad_LBO.reshape(*rows_PTX.shape[:2], -1)
        arriving = ctx.ranks.product_sum(grad_PTO, weight_OX)
        weight_grad = weight_gradient(ctx.of_weight, grad_PTO.flatten(0, 1), rows_PTX.flatten(0, 1))
        bias_grad = bias_gradient(ctx.of_bias, grad_PTO.flatten(0, 1)) if ctx.has_bias else None
        return arriving.wait().view(-1, grad_LBO.shape[1], weight_OX.shape[1]), weight_grad, bias_grad, None


class RowProduct(torch.autograd.Function):
    """This rank's rows of a product that is summed over the ranks, each of which has a part of the weight's columns."""

    @staticmethod
    def forward(ctx: Any, x_LBX: Tensor, weight_OX: Tensor, bias_O: Tensor | None, ranks: TensorRanks) -> Tensor:
        x_PTX = x_LBX.reshape(ranks.size, -1, x_LBX.shape[-1])
        ctx.save_for_backward(x_PTX, weight_OX)
        ctx.ranks, ctx.has_bias = ranks, bias_O is not None
        ctx.of_weight, ctx.of_bias = gradient_sum(weight_OX), gradient_sum(bias_O)
        return ranks.product_sum(x_PTX, weight_OX.t(), bias_O).wait().view(-1, x_LBX.shape[1], len(weight_OX))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_LBO: Tensor) -> tuple[Tensor | None, ...]:
        x_PTX, weight_OX = ctx.saved_tensors
        grad_TO = grad_LBO.contiguous().flatten(0, 1)
        grads_PTO = grad_TO.new_empty(len(x_PTX), *grad_TO.shape)
        x_grad_PTX = x_PTX.new_empty(x_PTX.shape)
        for places, there in ctx.ranks.gathering(grad_TO, grads_PTO):
            torch.mm(there.flatten(0, 1), weight_OX, out=x_grad_PTX[places].flatten(0, 1))
            if ctx.of_weight is not None:  # fp32, which adding in parts does not round
                ctx.of_weight.add_product(there.flatten(0, 1), x_PTX[places].flatten(0, 1))
        weight_grad = None
        if ctx.of_weight is None:
            weight_grad = weight_gradient(None, grads_PTO.flatten(0, 1), x_PTX.flatten(0, 1))
        # Of this rank's rows: the step sums it over the ranks.
        bias_grad = bias_gradient(ctx.of_bias, grad_TO) if ctx.has_bias else None
        return x_grad_PTX.view(-1, grad_LBO.shape[1], x_PTX.shape[-1]), weight_grad, bias_grad, None
