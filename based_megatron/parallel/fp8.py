"""Linear layers whose three products run in 8-bit floats (docs/fp8.md).

Legend: T tokens, K inputs and N outputs of a layer.

    forward          y = x W^T + b         rows of x and rows of W
    input gradient   dx = dy W             rows of dy, and W turned round
    weight gradient  dW = dy^T x           dy turned round, with the scales of the rows of x, and the numbers of x turned round

Each tensor is scaled by its own numbers, with no history. Rows of tokens do not know of each other: the forward pass of a token
has the same bits in every slice and micro batch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from based_megatron.kernels.fp8 import MULTIPLE, Fp8Matrix, quantised_rows, scaled_product, turned
from based_megatron.parallel.linear import WholeColumnLinear, WholeRowLinear


class Fp8Product:
    """The product of one linear layer, in place of `functional.linear`.

    A weight is cast where it is used; inside `weights_are_kept` once for all micro batches.
    """

    def __init__(self, weight: nn.Parameter, backend: str) -> None:
        """weight: that of the layer. Others, such as some of its rows, are cast at each use."""
        self.backend = backend
        self._weight = weight
        self._kept: dict[str, Fp8Matrix] | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: [..., K] -> x weight^T + bias, [..., N]."""
        return _Linear.apply(x, weight, bias, self)

    def rows(self, weight_NK: Tensor) -> Fp8Matrix:
        """The weight as the forward product takes it."""
        return self._cast("rows", weight_NK, lambda: quantised_rows(weight_NK.detach(), backend=self.backend))

    def turned(self, weight_NK: Tensor) -> Fp8Matrix:
        """The weight as the product of the input gradient takes it."""
        return self._cast("turned", weight_NK, lambda: turned(self.rows(weight_NK), backend=self.backend))

    def keep(self) -> None:
        """Cast the weight once until `forget`: it must not change before."""
        self._kept = {}

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = None

    def _cast(self, name: str, weight: Tensor, cast: Callable[[], Fp8Matrix]) -> Fp8Matrix:
        if self._kept is None or weight is not self._weight:
            return cast()
        if name not in self._kept:
            self._kept[name] = cast()
        return self._kept[name]


class _Linear(torch.autograd.Function):
    """(x, weight, bias or None, product) to x weight^T + bias. Backward keeps x in e4m3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, product: Fp8Product) -> Tensor:
        x_TK = quantised_rows(x.flatten(0, -2), backend=product.backend)
        ctx.save_for_backward(*x_TK, weight_NK)
        ctx.product, ctx.has_bias = product, bias_N is not None
        y_TN = scaled_product(x_TK, product.rows(weight_NK), bias_N, dtype=x.dtype, fast=True)
        return y_TN.view(*x.shape[:-1], len(weight_NK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *x_TK, weight_NK = ctx.saved_tensors
        dy_TN = dy.flatten(0, -2)
        dx_TK, dweight_NK = _gradients(
            quantised_rows(dy_TN, backend=ctx.product.backend), Fp8Matrix(*x_TK), weight_NK, ctx.product, dy.dtype
        )
        dbias_N = dy_TN.sum(0) if ctx.has_bias else None
        return dx_TK.view(*dy.shape[:-1], weight_NK.shape[1]), dweight_NK, dbias_N, None


def _gradients(
    dy_TN: Fp8Matrix, x_TK: Fp8Matrix, weight_NK: Tensor, product: Fp8Product, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight."""
    backend = product.backend
    dx_TK = scaled_product(dy_TN, product.turned(weight_NK), dtype=dtype)
    # The sum over tokens needs one scale for all of them: dy takes over those of x, which keeps its numbers.
    ones_T = torch.ones_like(x_TK.scale)
    dweight_NK = scaled_product(
        turned(dy_TN, x_TK.scale, backend=backend),
        turned(Fp8Matrix(x_TK.numbers, ones_T), backend=backend),
        dtype=weight_NK.dtype,
    )
    return dx_TK, dweight_NK


def use_fp8(blocks: Iterable[nn.Module], backend: str) -> list[Fp8Product]:
    """Have the linear layers of these blocks run in e4m3, except those whose sizes the hardware cannot take."""
    linear = (module for block in blocks for module in block.modules())
    layers = [layer for layer in linear if isinstance(layer, WholeColumnLinear | WholeRowLinear)]
    products = []
    for layer in layers:
        if all(size % MULTIPLE == 0 for size in layer.weight.shape):
            layer.product = Fp8Product(layer.weight, backend)
            products.append(layer.product)
    return products


def fp8_products(modules: Iterable[nn.Module]) -> list[Fp8Product]:
    """The products in e4m3 of all linear layers in these modules."""
    found = (getattr(part, "product", None) for module in modules for part in module.modules())
    return [product for product in found if isinstance(product, Fp8Product)]


@contextmanager
def weights_are_kept(products: list[Fp8Product]) -> Iterator[None]:
    """Surroundings in which no weight changes: each is cast once."""
    for product in products:
        product.keep()
    try:
        yield
    finally:
        for product in products:
            product.forget()
