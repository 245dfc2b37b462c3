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

from based_megatron.kernels.fp8 import (
    MULTIPLE,
    Fp8Matrix,
    quantised_rows,
    quantised_rows_and_sum,
    scaled_product,
    turned,
)
from based_megatron.kernels.fp8.tokens import Fp8Tokens, without_memory
from based_megatron.kernels.swiglu import swiglu_gradient_rows, swiglu_rows
from based_megatron.parallel.gradient_sums import gradient_sum
from based_megatron.parallel.linear import Projection, WholeColumnLinear, WholeRowLinear


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

    def __init__(self, weight: Tensor, backend: str, is_sharded: bool = False) -> None:
        """weight: that of the layer. is_sharded: ZeRO-3 gathers it for each pass, and frees it after."""
        self.backend, self.is_sharded = backend, is_sharded
        self._weight = weight
        self._kept: CastWeight | None = None
        self.one = torch.ones((), device=weight.device)
        """The scale of numbers that have none."""

    def __call__(self, x: Tensor | Fp8Tokens, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K] -> x weight^T + bias, [..., N]."""
        return _Linear.apply(*_parts(x, self.backend), weight, bias, self)

    def swiglu(self, x: Tensor | Fp8Tokens, weight: Tensor) -> Fp8Tokens:
        """The gate of x weight^T: [..., K] -> [..., N / 2]."""
        stand_in, *rows = _SwiGLU.apply(*_parts(x, self.backend), weight, self)
        return Fp8Tokens(stand_in, Fp8Matrix(*rows))

    def cast(self, weight_NK: Tensor) -> CastWeight:
        """The weight in e4m3."""
        if self._kept is not None and weight_NK is self._weight:
            return self._kept
        return CastWeight(weight_NK, self.backend)

    def keep(self) -> None:
        """Cast the weight once until `forget`, if it stays where it is: it must not change before."""
        if not self.is_sharded:
            self._kept = CastWeight(self._weight, self.backend, keeps=True)

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = None


def _parts(x: Tensor | Fp8Tokens, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of x flows through, its numbers [T, K], and their scales."""
    if isinstance(x, Fp8Tokens):
        return x.stand_in, x.rows_TD.numbers, x.rows_TD.scale
    numbers_TK, scale_T, _ = quantised_rows(x.detach().flatten(0, -2), backend=backend)
    return x, numbers_TK, scale_T


class _Layer(torch.autograd.Function):
    """What the layers below share: the product forward, and both products backward."""

    @staticmethod
    def product(
        ctx: Any, x: Tensor, x_TK: Fp8Matrix, weight_NK: Tensor, bias_N: Tensor | None, layer: Fp8Product
    ) -> Tensor:
        """x weight^T + bias, [T, N], in the type of x; keeps what backward needs."""
        ctx.cast, ctx.backend, ctx.shape, ctx.dtype = layer.cast(weight_NK), layer.backend, x.shape, x.dtype
        ctx.weight_dtype, ctx.of_weight, ctx.one = weight_NK.dtype, gradient_sum(weight_NK), layer.one
        return scaled_product(x_TK, ctx.cast.rows(), bias_N, dtype=x.dtype)

    @staticmethod
    def gradients(ctx: Any, dy_TN: Fp8Matrix, x_TK: Fp8Matrix) -> tuple[Tensor, Tensor | None]:
        """Those of x, and of the weight if it keeps no sum to add its own to."""
        # The first, because others wait for it.
        dx_TK = scaled_product(dy_TN, ctx.cast.turned(), dtype=ctx.dtype)
        # The sum over tokens needs one scale for all of them: dy takes over those of x, which keeps its numbers.
        dy_NT = turned(dy_TN, x_TK.scale, backend=ctx.backend).under_one_scale()
        x_KT = turned(Fp8Matrix(x_TK.numbers, ctx.one), backend=ctx.backend)
        dweight_NK = None
        if ctx.of_weight is None:
            dweight_NK = scaled_product(dy_NT, x_KT, dtype=ctx.weight_dtype)
        else:
            ctx.of_weight.add_made(lambda out: scaled_product(dy_NT, x_KT, dtype=torch.float32, out=out))
        return dx_TK.view(ctx.shape), dweight_NK


class _Linear(_Layer):
    """(x or its stand-in, numbers, scales, weight, bias or None, layer) to x weight^T + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        numbers_TK: Tensor,
        scale_T: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        layer: Fp8Product,
    ) -> Tensor:
        ctx.save_for_backward(numbers_TK, scale_T)
        ctx.of_bias = gradient_sum(bias_N)
        y_TN = _Layer.product(ctx, x, Fp8Matrix(numbers_TK, scale_T), weight_NK, bias_N, layer)
        return y_TN.view(*x.shape[:-1], y_TN.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, dy_TN, dbias_N = Fp8Matrix(*ctx.saved_tensors), dy.flatten(0, -2), None
        if ctx.needs_input_grad[4]:
            rows_TN, dbias_N = quantised_rows_and_sum(dy_TN, x_TK.scale, backend=ctx.backend)
        else:
            rows_TN = quantised_rows(dy_TN, x_TK.scale, backend=ctx.backend)
        dx, dweight_NK = _Layer.gradients(ctx, rows_TN, x_TK)
        if dbias_N is not None and ctx.of_bias is not None:
            ctx.of_bias.add(dbias_N)
            dbias_N = None
        return dx, None, None, dweight_NK, dbias_N, None


class _SwiGLU(_Layer):
    """(x or its stand-in, numbers, scales, weight, layer) to the gate of x weight^T: its stand-in, numbers and scales."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numbers_TK: Tensor, scale_T: Tensor, weight_NK: Tensor, layer: Fp8Product
    ) -> tuple[Tensor, ...]:
        z_TN = _Layer.product(ctx, x, Fp8Matrix(numbers_TK, scale_T), weight_NK, None, layer)
        ctx.save_for_backward(numbers_TK, scale_T, z_TN)
        numbers_TN, y_scale_T, _ = swiglu_rows(z_TN, backend=layer.backend)
        ctx.mark_non_differentiable(numbers_TN, y_scale_T)
        return without_memory(torch.Size((*x.shape[:-1], z_TN.shape[1] // 2)), x), numbers_TN, y_scale_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        numbers_TK, scale_T, z_TN = ctx.saved_tensors
        dz_TN = swiglu_gradient_rows(z_TN, dy.flatten(0, -2), scale_T, backend=ctx.backend)
        dx, dweight_NK = _Layer.gradients(ctx, dz_TN, Fp8Matrix(numbers_TK, scale_T))
        return dx, None, None, dweight_NK, None


def use_fp8(modules: Iterable[nn.Module], backend: str, is_sharded: bool) -> None:
    """Have the linear layers of these modules run in e4m3, except those whose sizes the hardware cannot take."""
    for layer in (part for module in modules for part in module.modules()):
        if not isinstance(layer, WholeColumnLinear | WholeRowLinear):
            continue
        if all(size % MULTIPLE == 0 for size in layer.weight.shape):
            layer.product = Fp8Product(layer.weight, backend, is_sharded)


def gated(projection: Projection) -> Fp8Tokens:
    """The gate of a projection, for a layer that `takes_fp8`: a body that its column layer runs."""
    layer = projection.product
    assert isinstance(layer, Fp8Product) and projection.bias is None
    return layer.swiglu(projection.x_LBD, projection.weight)


def takes_fp8(layer: nn.Module) -> bool:
    """Whether a layer runs in e4m3 and takes tokens that are cast already.

    Not under ZeRO-3, which looks for the tensors that leave a module, and would not find them.
    """
    product = getattr(layer, "product", None)
    return isinstance(product, Fp8Product) and not product.is_sharded


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
