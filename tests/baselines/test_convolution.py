"""Convolutions of few taps and of whole sequences equal sums over pairs of tokens, in values and gradients."""

import pytest
import torch
from recurrences import gradients

from based_megatron.baselines.operations.convolution import long_convolution
from based_megatron.baselines.operations.short_convolution import few_taps


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13])
def test_a_long_convolution_is_a_sum_over_pairs(tokens):
    generator = torch.Generator().manual_seed(1)
    u, h = (torch.randn(*shape, tokens, generator=generator, dtype=torch.float64) for shape in ((2, 3), (3,)))
    u, h = u.requires_grad_(), h.requires_grad_()
    found = long_convolution(u, h)
    expected = torch.stack([sum(h[:, j] * u[..., t - j] for j in range(t + 1)) for t in range(tokens)], dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients((found,), (u, h)), gradients((expected,), (u, h)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("tokens", "taps"), [(1, 3), (2, 3), (9, 3), (9, 1)])
def test_few_taps_are_a_sum_over_pairs(tokens, taps):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, tokens), (3, taps), (3,))
    u, w, bias = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    rows = [
        sum(w[:, taps - 1 - back] * u[..., t - back] for back in range(min(taps, t + 1))) + bias for t in range(tokens)
    ]
    found, expected = few_taps(u.mT, w, bias).mT, torch.stack(rows, dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    every = (u, w, bias)
    torch.testing.assert_close(gradients((found,), every), gradients((expected,), every), rtol=1e-10, atol=1e-10)


def test_bf16_is_convolved_in_fp32():
    u, h = torch.randn(2, 3, 50).bfloat16(), torch.randn(3, 50).bfloat16()
    found = long_convolution(u, h)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, long_convolution(u.double(), h.double()).float(), rtol=1e-4, atol=1e-4)
