"""The gate of the MLP: its order, its gradients, and what it keeps."""

import pytest
import torch
from kernel_oracles import DEVICE, saved_elements

from based_megatron.kernels.swiglu import swiglu

BACKENDS = ("reference", "triton")


def oracle(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.split(x.shape[-1] // 2, dim=-1)
    return value * gate / (1 + torch.exp(-gate))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 48), (3, 2, 70), (2, 4096)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_values_and_gradients_equal_the_formula(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, limit: float
) -> None:
    """In bf16 the reference rounds silu(gate) as well."""
    torch.manual_seed(shape[-1])
    x = (2 * torch.randn(shape)).to(DEVICE, dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, expected = swiglu(x, backend=backend), oracle(exact)
    cotangent = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, x, cotangent)
    (wanted,) = torch.autograd.grad(expected, exact, cotangent.double())
    for got, want in ((found, expected), (grad, wanted)):
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).norm() / want.norm() <= limit * (2 if backend == "reference" else 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_be_views(backend: str) -> None:
    x = torch.randn(6, 3, 16, device=DEVICE, requires_grad=True)
    transposed = swiglu(x.transpose(0, 1), backend=backend)
    torch.testing.assert_close(transposed, oracle(x).transpose(0, 1))
    (grad,) = torch.autograd.grad(transposed[:, ::2].sum(), x)
    (wanted,) = torch.autograd.grad(oracle(x)[::2].sum(), x)
    torch.testing.assert_close(grad, wanted)


def test_only_the_input_is_kept() -> None:
    x = torch.randn(4, 32, device=DEVICE, requires_grad=True)
    assert saved_elements(lambda: swiglu(x, backend="triton")) == x.numel()


def test_the_reference_takes_fp64() -> None:
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
