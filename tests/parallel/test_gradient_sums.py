"""Sums of gradients over micro batches: each way into them, and what the first micro batch of a step overwrites."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from based_megatron.parallel.gradient_sums import gradient, gradient_sum, keep_sum, linear
from support.pool import rank_device

MICRO_BATCHES, TOKENS, FEATURES, OUTPUTS = 3, 24, 16, 8


def layer(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    """A linear layer that keeps sums, whose buffers hold what an earlier step has left."""
    torch.manual_seed(0)
    made = nn.Linear(FEATURES, OUTPUTS, bias=bias, dtype=dtype, device=rank_device(0))
    for parameter in made.parameters():
        keep_sum(parameter, torch.full((parameter.numel(),), 5.0, device=parameter.device))
    return made


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, TOKENS // 2, FEATURES)
    return [torch.randn(shape, generator=generator).to(rank_device(0), dtype) for _ in range(MICRO_BATCHES)]


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).square().sum()


def expected(made: nn.Linear, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums in fp64 of the gradients of the same numbers."""
    exact = nn.Linear(FEATURES, OUTPUTS, bias=made.bias is not None).to(rank_device(0), torch.float64)
    exact.load_state_dict(made.state_dict())
    for x in batches:
        y = functional.linear(x.double(), exact.weight, exact.bias)
        (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).double()).square().sum().backward()
    return {name: parameter.grad for name, parameter in exact.named_parameters()}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_add_up(dtype: torch.dtype, limit: float, bias: bool) -> None:
    made, batches = layer(dtype, bias), inputs(dtype)
    for _ in range(2):  # the second step overwrites the first
        for x in batches:
            loss_of(linear(x, made.weight, made.bias)).backward()
        for name, wanted in expected(made, batches).items():
            parameter = made.get_parameter(name)
            assert parameter.grad is None and gradient(parameter) is gradient_sum(parameter).values
            assert float((gradient(parameter) - wanted).norm() / wanted.norm()) < limit, name
            gradient_sum(parameter).begin()


def test_the_gradient_of_the_input_is_that_of_a_linear_layer() -> None:
    made, x = layer(torch.float32), inputs(torch.float32)[0].requires_grad_()
    (found,) = torch.autograd.grad(loss_of(linear(x, made.weight, made.bias)), x)
    (wanted,) = torch.autograd.grad(loss_of(functional.linear(x, made.weight, made.bias)), x)
    torch.testing.assert_close(found, wanted)


def test_bf16_products_are_not_rounded() -> None:
    """A bf16 gradient has 8 bits; the sum keeps those of fp32."""
    made, x = layer(torch.bfloat16, bias=False), inputs(torch.bfloat16)[0]
    dy = torch.randn(TOKENS, OUTPUTS).to(x)
    y = linear(x, made.weight)
    y.backward(dy.view_as(y))
    wanted = dy.double().t() @ x.double().view(-1, FEATURES)
    assert float((gradient(made.weight) - wanted).norm() / wanted.norm()) < 1e-6


def test_other_uses_of_a_parameter_are_added_by_a_hook() -> None:
    """As of a tied embedding, which is read by rows and is the weight of a product."""
    made, x = layer(torch.float32, bias=False), inputs(torch.float32)[0]
    rows = torch.tensor([1, 1, 5], device=x.device)
    loss = loss_of(linear(x, made.weight)) + loss_of(functional.embedding(rows, made.weight))
    loss.backward()
    exact = made.weight.detach().clone().requires_grad_()
    (loss_of(functional.linear(x, exact)) + loss_of(functional.embedding(rows, exact))).backward()
    torch.testing.assert_close(gradient(made.weight), exact.grad)
    assert made.weight.grad is None


def test_sums_of_nothing_are_zero() -> None:
    made = layer(torch.float32)
    total = gradient_sum(made.weight)
    total.complete()
    assert not total.values.any()
    total.add(torch.ones_like(made.weight))
    assert total.values.eq(1).all()
    total.complete()
    assert total.values.eq(1).all(), "what was added stays"


def test_without_a_sum_a_gradient_is_where_torch_has_it() -> None:
    plain, x = nn.Linear(FEATURES, OUTPUTS), inputs(torch.float32)[0].cpu()
    loss_of(linear(x, plain.weight, plain.bias)).backward()
    assert plain.weight.grad is not None and gradient(plain.weight) is plain.weight.grad and gradient_sum(None) is None


def test_evaluation_needs_no_sums() -> None:
    made, x = layer(torch.float32), inputs(torch.float32)[0]
    with torch.no_grad():
        y = linear(x, made.weight, made.bias)
    assert y.grad_fn is None and gradient_sum(made.weight).is_empty
