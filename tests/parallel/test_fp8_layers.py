"""Linear layers in e4m3: values and gradients against fp64 products of rounded numbers, and weights that are cast once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from based_megatron.kernels.fp8 import quantised_rows
from based_megatron.parallel import fp8
from based_megatron.parallel.fp8 import Fp8Product, weights_are_kept
from support.pool import on_gpu

DEVICE = torch.device("cuda" if on_gpu() else "cpu")
BACKENDS = ("reference", "triton")
ROWS, INPUTS, OUTPUTS = 40, 48, 32


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer(backend: str, dtype: torch.dtype = torch.float32) -> tuple[Fp8Product, nn.Parameter, nn.Parameter]:
    weight, bias = (nn.Parameter(x.to(dtype)) for x in (seeded(OUTPUTS, INPUTS, seed=1), seeded(OUTPUTS, seed=2)))
    return Fp8Product(weight, backend), weight, bias


def uneven_tokens() -> Tensor:
    """Two sequences whose tokens differ in size by a factor of 64, with one that is zero."""
    sizes = torch.exp2(torch.arange(ROWS).view(2, ROWS // 2, 1) % 7).to(DEVICE)
    x = seeded(2, ROWS // 2, INPUTS, seed=3) * sizes
    x[1, 4] = 0
    return x


def cast(x: Tensor) -> Tensor:
    """The numbers that e4m3 keeps of rows, fp64."""
    matrix = quantised_rows(x.flatten(0, -2))
    return (matrix.numbers.double() * matrix.scale.double()[:, None]).view(x.shape)


def run(product: Any, x: Tensor, weight: Tensor, bias: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = product(x, weight, bias)
    return (y, *torch.autograd.grad(y, (x, weight, bias), cotangent.to(y.dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_and_gradients_are_those_of_the_rounded_numbers(backend: str) -> None:
    """Weight gradient and input gradient bring rows to one scale, where small rows lose bits: 1e-3 of the whole here."""
    product, weight, bias = layer(backend)
    x, cotangent = uneven_tokens(), seeded(2, ROWS // 2, OUTPUTS, seed=4)
    found = run(product, x, weight, bias, cotangent)
    x64, weight64, dy64 = cast(x), cast(weight.detach()), cast(cotangent)
    wanted = (
        functional.linear(x64, weight64, bias.double()),
        dy64 @ weight64,
        dy64.flatten(0, 1).t() @ x64.flatten(0, 1),
        cotangent.double().flatten(0, 1).sum(0),
    )
    for got, want, limit in zip(found, wanted, (1e-6, 1e-3, 1e-3, 1e-6), strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() / want.norm() < limit


def test_they_are_near_those_of_plain_numbers() -> None:
    """Rounding to 3 bits errs by 2^-4 at most, 2.6 % in the mean of squares for each side."""
    product, weight, bias = layer("reference")
    x, cotangent = uneven_tokens(), seeded(2, ROWS // 2, OUTPUTS, seed=4)
    for got, want in zip(
        run(product, x, weight, bias, cotangent), run(functional.linear, x, weight, bias, cotangent), strict=True
    ):
        assert (got - want).norm() / want.norm() < 0.045


def test_a_token_has_the_same_bits_in_every_slice() -> None:
    product, weight, bias = layer("reference", torch.bfloat16)
    x = uneven_tokens().bfloat16()
    whole = product(x, weight, bias)
    assert torch.equal(product(x[1:, 3:9], weight, bias), whole[1:, 3:9])
    assert torch.equal(product(x, weight[8:24], bias[8:24]), whole[..., 8:24])


def test_backward_keeps_the_input_in_eight_bits() -> None:
    product, weight, bias = layer("reference", torch.bfloat16)
    kept: list[int] = []

    def count(x: Tensor) -> Tensor:
        kept.append(x.nbytes if x is not weight else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        product(uneven_tokens().bfloat16(), weight, bias)
    assert sum(kept) == ROWS * INPUTS + 4 * ROWS


def test_weights_are_cast_once_while_they_are_kept(monkeypatch) -> None:
    casts: list[int] = []
    original = fp8.quantised_rows
    monkeypatch.setattr(fp8, "quantised_rows", lambda x, **options: (casts.append(len(x)), original(x, **options))[1])
    product, weight, bias = layer("reference")
    x, cotangent = uneven_tokens(), seeded(2, ROWS // 2, OUTPUTS, seed=4)
    with weights_are_kept([product]):
        first = run(product, x, weight, bias, cotangent)
        run(product, x, weight, bias, cotangent)
        run(product, x, weight[:16], bias[:16], cotangent[..., :16])
    assert casts.count(OUTPUTS) == 1 and casts.count(16) == 2
    with torch.no_grad():
        weight.mul_(2)
    with weights_are_kept([product]):
        assert not torch.equal(run(product, x, weight, bias, cotangent)[0], first[0])
    assert torch.equal(run(product, x, weight, bias, cotangent)[0], product(x, weight, bias))
