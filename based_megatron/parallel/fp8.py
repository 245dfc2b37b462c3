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
from based_megatron.parallel.gradient_sums import GradientSum, gradient_sum
from based_megatron.parallel.linear import WholeColumnLinear, WholeRowLinear


class CastWeight:
    """A weight in e4m3, both ways round."""

    def __init__(self, weight_NK: Tensor, backend: str, keeps: bool = False) -> None:
        """keeps: the weight does not change, and each way round is cast once."""
        self._weight, self._backend, self._keeps = weight_NK, backend, keeps
        self._kept: dict[str, Fp8Matrix] = {}

    def rows(self) -> Fp8Matrix:
        """As the forward product takes it, [N, K]."""
        return self._cast("rows", lambda: quantised_rows(self._weight.detach(), backend=self._backend))

    def turned(self) -> Fp8Matrix:
        """As the product of the input gradient takes it, [K, N]."""
        return self._cast("turned", lambda: turned(self.rows(), backend=self._backend))

    def _cast(self, name: str, cast: Callable[[], Fp8Matrix]) -> Fp8Matrix:
        found = self._kept.get(name)
        if found is None:
            found = cast()
            if self._keeps:
                self._kept[name] = found
        return found


class Fp8Product:
    """The product of one linear layer, in place of `gradient_sums.linear`."""

    def __init__(self, weight: nn.Parameter, backend: str) -> None:
        """weight: that of the layer, which is cast once inside `weights_are_kept`; other ones are cast at each use."""
        self.backend = backend
        self._weight = weight
        self._kept: CastWeight | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K] -> x weight^T + bias, [..., N]."""
        return _Linear.apply(x, weight, bias, self)

    def cast(self, weight_NK: Tensor) -> CastWeight:
        """The weight in e4m3."""
        if self._kept is not None and weight_NK is self._weight:
            return self._kept
        return CastWeight(weight_NK, self.backend)

    def keep(self) -> None:
        """Cast the weight once until `forget`: it must not change before."""
        self._kept = CastWeight(self._weight, self.backend, keeps=True)

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = None


class _Linear(torch.autograd.Function):
    """(x, weight, bias or None, product) to x weight^T + bias. Backward keeps x in e4m3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, product: Fp8Product) -> Tensor:
        x_TK, cast = quantised_rows(x.flatten(0, -2), backend=product.backend), product.cast(weight_NK)
        ctx.save_for_backward(*x_TK)
        ctx.cast, ctx.backend, ctx.weight_dtype = cast, product.backend, weight_NK.dtype
        ctx.of_weight, ctx.of_bias = gradient_sum(weight_NK), gradient_sum(bias_N)
        y_TN = scaled_product(x_TK, cast.rows(), bias_N, dtype=x.dtype, fast=True)
        return y_TN.view(*x.shape[:-1], len(weight_NK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, dy_TN = Fp8Matrix(*ctx.saved_tensors), dy.flatten(0, -2)
        rows_TN = quantised_rows(dy_TN, backend=ctx.backend)
        # The first, because others wait for it.
        dx_TK = scaled_product(rows_TN, ctx.cast.turned(), dtype=dy.dtype)
        dweight_NK = _weight_gradient(rows_TN, x_TK, ctx.of_weight, ctx.weight_dtype, ctx.backend)
        dbias_N = None
        if ctx.needs_input_grad[2] and ctx.of_bias is None:
            dbias_N = dy_TN.sum(0)
        elif ctx.needs_input_grad[2]:
            ctx.of_bias.add_rows(dy_TN)
        return dx_TK.view(*dy.shape[:-1], dx_TK.shape[1]), dweight_NK, dbias_N, None


def _weight_gradient(
    dy_TN: Fp8Matrix, x_TK: Fp8Matrix, total: GradientSum | None, dtype: torch.dtype, backend: str
) -> Tensor | None:
    """dy^T x, added to the sum that the weight keeps, if it keeps one."""
    # The sum over tokens needs one scale for all of them: dy takes over those of x, which keeps its numbers.
    dy_NT = turned(dy_TN, x_TK.scale, backend=backend)
    x_KT = turned(Fp8Matrix(x_TK.numbers, torch.ones_like(x_TK.scale)), backend=backend)
    if total is None:
        return scaled_product(dy_NT, x_KT, dtype=dtype)
    total.add_made(lambda out: scaled_product(dy_NT, x_KT, dtype=torch.float32, out=out))
    return None


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
