"""RMSNorm: in the residual's precision, out in the weights'."""

import pytest
import torch
from small_models import shared_config

from based_megatron.model.norm import RMSNorm


def make(dtype: torch.dtype, **model) -> RMSNorm:
    norm = RMSNorm(shared_config(dtype, **model))
    norm.weight.data.copy_(torch.linspace(0.5, 2.0, 32))
    return norm


def by_hand(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_it_divides_by_the_root_mean_square(eps):
    norm, x = make(torch.float64, norm_eps=eps), torch.randn(5, 2, 32, dtype=torch.float64)
    torch.testing.assert_close(norm(x)[1], by_hand(x, norm.weight, eps), rtol=1e-12, atol=1e-12)


def test_bf16_weights_norm_an_fp32_residual_and_round_once():
    """Elements that bf16 could not tell apart before the norm: 256 + n / 4."""
    norm, x = make(torch.bfloat16), 256 + torch.arange(32.0)[None] / 4
    assert norm(x)[1].dtype == torch.bfloat16
    assert torch.equal(norm(x)[1], by_hand(x, norm.weight, 1e-5).to(torch.bfloat16))
    assert not torch.equal(norm(x)[1], norm(x.bfloat16().float())[1]), "the residual was rounded before the norm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_starts_at_one_and_keeps_its_gradient_in_its_dtype(dtype):
    norm = RMSNorm(shared_config(dtype))
    assert torch.equal(norm.weight, torch.ones(32, dtype=dtype))
    norm(torch.randn(3, 32))[1].sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == dtype


def test_an_update_is_added_in_the_residuals_precision():
    """bf16 would lose steps of 2^-20 next to 1."""
    norm, residual = make(torch.bfloat16), 1 + torch.arange(32.0)[None] * 2**-20
    update = torch.full((1, 32), 0.5, dtype=torch.bfloat16)
    added, normed = norm(residual, update)
    assert torch.equal(added, residual + 0.5)
    assert torch.equal(normed, norm(residual + 0.5)[1])
