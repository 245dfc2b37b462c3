"""Addition and RMSNorm: values and gradients of both outputs against the definition, in every backend."""

import pytest
import torch
from kernel_oracles import DEVICE, assert_same_gradients
from torch import Tensor

from based_megatron.kernels.rms_norm import add_rms_norm

BACKENDS = ("reference", "triton")


def oracle(residual: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r = residual if update is None else residual + update
    return r, r * (r.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def as_leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("shape", [(1, 8), (7, 24), (3, 2, 64), (2, 1, 100)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_values_and_gradients_equal_the_formula(
    backend: str, with_update: bool, shape: tuple[int, ...], eps: float
) -> None:
    torch.manual_seed(sum(shape))
    tensors = [some(*shape), some(shape[-1])] + ([some(*shape)] if with_update else [])
    inputs, exact = as_leaves(*tensors), as_leaves(*tensors, dtype=torch.float64)
    found = add_rms_norm(inputs[0], inputs[2] if with_update else None, inputs[1], eps, backend=backend)
    expected = oracle(exact[0], exact[2] if with_update else None, exact[1], eps)
    torch.manual_seed(1)
    cotangents = [torch.randn(shape, device=DEVICE) for _ in range(2)]
    grads = torch.autograd.grad(found, inputs, cotangents)
    expected_grads = torch.autograd.grad(expected, exact, [x.double() for x in cotangents])
    for got, want in zip([*found, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(backend: str, used: int) -> None:
    torch.manual_seed(used)
    tensors = some(5, 16), some(5, 16), some(16)
    inputs, exact = as_leaves(*tensors), as_leaves(*tensors, dtype=torch.float64)
    cotangent = torch.randn(5, 16, device=DEVICE)
    found = add_rms_norm(*inputs, 1e-5, backend=backend)[used]
    expected = oracle(*exact, 1e-5)[used]
    grads = torch.autograd.grad(found, inputs, cotangent, allow_unused=True)
    wanted = torch.autograd.grad(expected, exact, cotangent.double(), allow_unused=True)
    for got, want in zip(grads, wanted, strict=True):
        got, want = (torch.zeros(1, device=DEVICE) if x is None else x.double() for x in (got, want))
        torch.testing.assert_close(got.double(), want.double().expand_as(got), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_updates_and_weights_on_an_fp32_residual(backend: str) -> None:
    """Dtypes stay apart, and only the outputs round."""
    torch.manual_seed(0)
    tensors = some(9, 48), some(9, 48, dtype=torch.bfloat16), some(48, dtype=torch.bfloat16)
    inputs, exact = as_leaves(*tensors), as_leaves(*tensors, dtype=torch.float64)
    found, expected = add_rms_norm(*inputs, 1e-5, backend=backend), oracle(*exact, 1e-5)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16]
    cotangents = torch.randn(9, 48, device=DEVICE), torch.randn(9, 48, device=DEVICE).bfloat16()
    grads = torch.autograd.grad(found, inputs, cotangents)
    wanted = torch.autograd.grad(expected, exact, [x.double() for x in cotangents])
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]
    for got, want in zip([*found, *grads], [*expected, *wanted], strict=True):
        limit = 1e-6 if got.dtype == torch.float32 else 2**-9
        assert (got.double() - want).norm() / want.norm() < limit


def test_the_reference_takes_fp64() -> None:
    torch.manual_seed(3)
    inputs = as_leaves(some(4, 6, dtype=torch.float64), some(4, 6, dtype=torch.float64), some(6, dtype=torch.float64))
    assert_same_gradients(add_rms_norm(*inputs, 1e-5), oracle(*inputs, 1e-5), inputs, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_gradients_run_to_run(backend: str) -> None:
    torch.manual_seed(4)
    inputs = as_leaves(some(33, 40), some(33, 40), some(40))
    runs = [torch.autograd.grad(add_rms_norm(*inputs, 1e-5, backend=backend)[1].sin().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
