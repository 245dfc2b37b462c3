"""Norm and SwiGLU that write e4m3: their numbers, scales and gradients against those of the kernels that write bf16."""

import pytest
import torch
from kernel_oracles import DEVICE
from torch import Tensor

from based_megatron.kernels.fp8 import Fp8Matrix, quantised_rows
from based_megatron.kernels.fp8.tokens import Fp8Tokens, stand_in
from based_megatron.kernels.rms_norm import add_rms_norm, add_rms_norm_rows
from based_megatron.kernels.swiglu import swiglu, swiglu_gradient_rows, swiglu_rows

BACKENDS = ("reference", "triton")


def check_rows(found: Fp8Matrix, exact: Tensor) -> None:
    """Numbers within half a step of the exact ones, under scales that are powers of two and no larger than needed.

    An exact number between two steps may go to either, if the kernel's differs from it by a rounding of fp32.
    """
    exact = exact.cpu()
    numbers, scale = found.numbers.cpu().double(), found.scale.cpu().double()
    assert numbers.shape == exact.shape
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    largest = exact.abs().amax(1) / scale
    assert (largest <= 448.01).all() and (largest > 223.99).all()
    step = torch.exp2((torch.frexp(exact / scale[:, None]).exponent - 1).clamp(min=-6) - 3.0)
    assert ((numbers - exact / scale[:, None]).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 16), (37, 80), (3, 2048)])
def test_swiglu_and_its_gradient(backend: str, shape: tuple[int, int]) -> None:
    T, D = shape
    generator = torch.Generator().manual_seed(D)
    x, dy = (torch.randn(T, n, generator=generator).to(DEVICE, torch.bfloat16) for n in (2 * D, D))
    exact = x.double().requires_grad_()
    y = swiglu(exact)
    (dx,) = torch.autograd.grad(y, exact, dy.double())
    check_rows(swiglu_rows(x, backend=backend), y.detach())
    check_rows(swiglu_gradient_rows(x, dy, backend=backend), dx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_update", [False, True])
def test_norm_and_its_gradients(backend: str, has_update: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    residual, update, cotangent = (torch.randn(5, 3, 80, generator=generator).to(DEVICE) for _ in range(3))
    weight = torch.randn(80, generator=generator).to(DEVICE, torch.bfloat16)
    inputs = [residual, update.bfloat16(), weight] if has_update else [residual, weight]

    def run(norm) -> tuple[Tensor, Tensor | Fp8Tokens, tuple[Tensor, ...]]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        total, normed = norm(leaves[0], leaves[1] if has_update else None, leaves[-1], 1e-5, backend=backend)
        out = normed.stand_in if isinstance(normed, Fp8Tokens) else normed
        return total, normed, torch.autograd.grad([total, out], leaves, [cotangent, cotangent.bfloat16()])

    total, tokens, gradients = run(add_rms_norm_rows)
    wanted_total, _, wanted = run(add_rms_norm)
    assert torch.equal(total, wanted_total)
    assert all(torch.equal(got, want) for got, want in zip(gradients, wanted, strict=True))
    update64 = update.bfloat16().double() if has_update else None
    exact = add_rms_norm(residual.double(), update64, weight.double(), 1e-5)[1]
    check_rows(tokens.rows_TD, exact.flatten(0, 1))
    assert tokens.stand_in.shape == (5, 3, 80) and tokens.stand_in.dtype == torch.bfloat16


def test_a_stand_in_has_no_memory_and_the_gradient_of_what_it_stands_for() -> None:
    x = torch.randn(4, 3, 16, device=DEVICE, requires_grad=True)
    found = stand_in(x)
    assert found.shape == x.shape and found.untyped_storage().nbytes() == 4
    cotangent = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(found, x, cotangent)[0], cotangent)


def test_some_tokens_of_every_sequence() -> None:
    x = torch.randn(6, 2, 16, device=DEVICE)
    tokens = Fp8Tokens(stand_in(x), quantised_rows(x.flatten(0, 1)))
    last = tokens[4:]
    assert last.shape == (2, 2, 16)
    assert torch.equal(last.rows_TD.plain(), tokens.rows_TD.plain()[8:])
