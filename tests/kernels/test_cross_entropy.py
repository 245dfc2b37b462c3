"""Cross entropy over the vocabulary: one rank, ranks that share it, and columns that only pad."""

import pytest
import torch
import torch.distributed as dist
from kernel_oracles import DEVICE
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.cross_entropy import vocab_cross_entropy
from support.cases import each
from support.pool import rank_device

BACKENDS = ("reference", "triton")


def some(tokens: int, columns: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + columns)
    logits = (scale * torch.randn(tokens, columns, generator=generator)).to(dtype)
    return logits.to(DEVICE), torch.randint(0, columns, (tokens,), generator=generator).to(DEVICE)


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm())


def errors(logits: Tensor, labels: Tensor, backend: str, columns: int | None = None) -> tuple[float, float]:
    """Errors of the loss and of the gradient, against autograd in fp64 over the columns that count."""
    exact = logits.detach().double().requires_grad_()
    weights = torch.linspace(-1, 2, len(labels), device=DEVICE)
    leaf = logits.detach().clone().requires_grad_()
    # The gradient is written over the logits: they must be an intermediate value, as in a model.
    loss = vocab_cross_entropy(leaf * 1, labels, columns=columns, backend=backend)
    (grad,) = torch.autograd.grad((loss * weights).sum(), leaf)
    wanted = functional.cross_entropy(exact[:, :columns], labels, reduction="none")
    (wanted_grad,) = torch.autograd.grad((wanted * weights.double()).sum(), exact)
    assert loss.dtype == torch.float32 and grad.dtype == logits.dtype
    return relative(loss, wanted), relative(grad, wanted_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 2), (5, 91), (3, 4096), (2, 9001)])
def test_values_and_gradients_equal_the_formula(backend: str, tokens: int, columns: int) -> None:
    assert all(error < 1e-5 for error in errors(*some(tokens, columns), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_logits_lose_nothing_but_the_gradients_rounding(backend: str) -> None:
    loss, grad = errors(*some(16, 500, torch.bfloat16), backend)
    assert loss < 1e-6 and grad < 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_logits_do_not_overflow(backend: str, offset: float) -> None:
    logits, labels = some(4, 33)
    assert all(error < 1e-2 for error in errors(logits + offset, labels, backend))
    logits[1, 5] = 200
    assert all(error < 1e-5 for error in errors(logits, labels, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_pad_take_no_part_and_get_no_gradient(backend: str) -> None:
    logits, labels = some(6, 40)
    assert all(error < 1e-5 for error in errors(logits, labels % 37, backend, columns=37))


def test_a_second_backward_pass_is_refused() -> None:
    """Its logits are gone: the first pass wrote the gradient over them."""
    logits, labels = some(3, 20)
    leaf = logits.requires_grad_()
    loss = vocab_cross_entropy(leaf * 1, labels, backend="triton").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def errors_of_cut_columns(backend: str) -> float:
    """A vocabulary of 37 over the ranks, the last one padded; every rank checks its columns."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    vocab, width = 37, -(-37 // size)
    logits, labels = (x.to(rank_device(rank)) for x in some(8, vocab))
    padded = functional.pad(logits, (0, width * size - vocab), value=7.0)
    own = slice(rank * width, (rank + 1) * width)
    leaf = padded[:, own].clone().requires_grad_()
    columns = min(width, vocab - rank * width)
    loss = vocab_cross_entropy(leaf * 1, labels, columns=columns, group=group, backend=backend)
    (grad,) = torch.autograd.grad(loss.square().sum(), leaf)
    exact = logits.double().requires_grad_()
    wanted = functional.cross_entropy(exact, labels, reduction="none")
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), exact)
    wanted_own = functional.pad(wanted_grad, (0, width * size - vocab))[:, own]
    return max(relative(loss, wanted), relative(grad, wanted_own))


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_share_a_vocabulary_agree_with_one(worker_pool, ranks: int) -> None:
    found = worker_pool(ranks).run(each, errors_of_cut_columns, list(BACKENDS))
    assert all(error < 1e-5 for by_backend in found for error in by_backend.values())
