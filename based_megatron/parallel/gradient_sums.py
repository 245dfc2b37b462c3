"""The fp32 sums of gradients over the micro batches of a step, and the ways into them.

Under ZeRO-1 a bf16 parameter has its gradient nowhere but in such a sum, a view of ZeRO's flat buffer. The weight of a linear
layer is added to inside the very matrix product that makes its gradient; what autograd hands over otherwise is added by a hook.

Legend: T tokens, D features of the input, O features of the output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from based_megatron.kernels.backend import resolve_backend
from based_megatron.kernels.column_sum import column_sum
from based_megatron.kernels.layout import unit_last_stride


class GradientSum:
    """The sum of one parameter's gradients over the micro batches of a step. The first one overwrites what is there."""

    def __init__(self, sum_fp32: Tensor) -> None:
        """sum_fp32: of the parameter's shape."""
        self.values, self.is_empty = sum_fp32, True
        self._backend = resolve_backend("auto", sum_fp32.device)

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of any float dtype."""
        if self.is_empty:
            self.values.copy_(gradient)
        else:
            self.values.add_(gradient)
        self.is_empty = False

    def add_rows(self, dy_TO: Tensor) -> None:
        """Add the gradient of a bias, the sum of dy over tokens."""
        column_sum(unit_last_stride(dy_TO), self.values, adds=not self.is_empty, backend=self._backend)
        self.is_empty = False

    def add_product(self, dy_TO: Tensor, x_TD: Tensor) -> None:
        """Add the gradient of a weight, dy^T x, which no dtype below fp32 rounds."""
        dtype = self.values.dtype
        if not self.values.is_cuda:
            # On a CPU products have the dtype of their factors.
            self.values.addmm_(dy_TO.to(dtype).t(), x_TD.to(dtype), beta=0 if self.is_empty else 1)
        elif self.is_empty:
            torch.mm(dy_TO.t(), x_TD, out_dtype=dtype, out=self.values)
        else:
            torch.addmm(self.values, dy_TO.t(), x_TD, out_dtype=dtype, out=self.values)
        self.is_empty = False

    def add_made(self, make: Callable[[Tensor | None], Tensor]) -> None:
        """Add a gradient that `make` writes to the fp32 tensor it is given, or to one of its own if it is given none."""
        if self.is_empty:
            make(self.values)
        else:
            self.values.add_(make(None))
        self.is_empty = False

    def complete(self) -> None:
        """Make the sum zero if nothing was added in this step: what is there is of an earlier one."""
        if self.is_empty:
            self.values.zero_()
            self.is_empty = False

    def begin(self) -> None:
        """Begin the sum of another step, which may be long before its first gradient is there."""
        self.is_empty = True


def keep_sum(parameter: nn.Parameter, sum_fp32: Tensor) -> GradientSum:
    """Sum up the gradients of a parameter here from now on, instead of in its `.grad`."""
    total = GradientSum(sum_fp32.view(parameter.shape))
    parameter.gradient_sum = total  # type: ignore[attr-defined]

    @torch.no_grad()
    def take(parameter: Tensor) -> None:
        # It is called as well where a product has added the gradient, and autograd was given none.
        if parameter.grad is not None:
            total.add(parameter.grad)
            parameter.grad = None

    parameter.register_post_accumulate_grad_hook(take)
    return total


def gradient_sum(tensor: Tensor | None) -> GradientSum | None:
    """The sum that a parameter keeps; None if it keeps none, or is no parameter."""
    return getattr(tensor, "gradient_sum", None)


def gradient(parameter: Tensor) -> Tensor | None:
    """The summed gradient of a parameter: in its sum if it keeps one, else its `.grad`."""
    kept = gradient_sum(parameter)
    return parameter.grad if kept is None else kept.values


def weight_gradient(total: GradientSum | None, dy_TO: Tensor, x_TD: Tensor) -> Tensor | None:
    """dy^T x, [O, D]; None if it has been added to the sum that the weight keeps."""
    if total is None:
        return dy_TO.t() @ x_TD
    total.add_product(dy_TO, x_TD)
    return None


def bias_gradient(total: GradientSum | None, dy_TO: Tensor) -> Tensor | None:
    """The sum of dy over tokens, [O]; None if it has been added to the sum that the bias keeps."""
    if total is None:
        return dy_TO.sum(0)
    total.add_rows(dy_TO)
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `functional.linear`; a weight and a bias that keep sums get their gradients there, without a copy of them."""
    if gradient_sum(weight) is None or not torch.is_grad_enabled():
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """(x [..., D], weight [O, D], bias [O] or None) to [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # As they are: a saved tensor is another Python object, without the sum.
        ctx.of_weight, ctx.of_bias = gradient_sum(weight), gradient_sum(bias)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # The first, because others wait for it.
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dy_TO = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            ctx.of_weight.add_product(dy_TO, x.reshape(-1, x.shape[-1]))
        return dx, None, bias_gradient(ctx.of_bias, dy_TO) if ctx.needs_input_grad[2] else None
