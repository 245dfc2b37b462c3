"""The averages of RWKV-4 equal the softmax over all pairs of tokens that they are, however large keys are; and sums that fade, a loop."""

import pytest
import torch
from recurrences import gradients, some_ids
from torch import Tensor

from based_megatron.baselines.operations.decayed_sums import decayed_sums
from based_megatron.baselines.operations.wkv import wkv

B, T, C = 3, 13, 4


def some_inputs(dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, bonuses and log decays."""
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(B, T, C, generator=generator, dtype=dtype) for _ in range(2))
    u, w = (torch.randn(C, generator=generator, dtype=dtype) for _ in range(2))
    return size * k, v, u, -w.exp()


def averages(k: Tensor, v: Tensor, u: Tensor, w: Tensor, ids: Tensor | None = None) -> Tensor:
    """Softmax over the tokens so far, one output after the other."""
    outputs = []
    for t in range(k.shape[1]):
        exponents = torch.stack([(t - 1 - j) * w + k[:, j] for j in range(t)] + [u + k[:, t]], dim=1)
        if ids is not None:
            exponents = exponents.masked_fill((ids[:, : t + 1] != ids[:, t, None])[..., None], -torch.inf)
        outputs.append((exponents.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_they_are_the_softmax_over_pairs(size, packed):
    """Keys of 300 are beyond what e^key could hold relative to one reference for all tokens."""
    inputs = tuple(x.requires_grad_() for x in some_inputs(size=size))
    ids = some_ids(B, T) if packed else None
    found, expected = wkv(*inputs, document_ids_BT=ids)[0], averages(*inputs, ids)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients((found,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("cut", [1, 6, 12])
def test_a_state_goes_on(cut, size):
    inputs = tuple(x.requires_grad_() for x in some_inputs(size=size))
    k, v, u, w = inputs
    first, state = wkv(k[:, :cut], v[:, :cut], u, w)
    second, _ = wkv(k[:, cut:], v[:, cut:], u, w, initial_state=state)
    found, expected = torch.cat([first, second], dim=1), averages(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients((found,), inputs), gradients((expected,), inputs), rtol=1e-9, atol=1e-10)


def test_a_state_of_zeros_is_nothing_even_before_the_smallest_keys():
    """A fresh decoding buffer says 0 for its largest exponent, next to which e^-300 would vanish in fp32."""
    k, v, u, w = some_inputs(torch.float32)
    zeros = (torch.zeros(B, C), torch.zeros(B, C, 2))
    found, _ = wkv(k - 300, v, u, w, initial_state=zeros)
    torch.testing.assert_close(found, averages(k, v, u, w), rtol=1e-4, atol=1e-4)


def test_finite_differences():
    k, v, u, w = some_inputs()
    inputs = tuple(x.requires_grad_() for x in (k[:1, :5, :2], v[:1, :5, :2], u[:2], w[:2]))
    assert torch.autograd.gradcheck(lambda *x: wkv(*x)[0], inputs)


def test_it_is_the_one_of_transformers():
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    k, v, u, w = some_inputs(torch.float32)
    expected, _ = modeling.rwkv_linear_attention_cpu((-w).log(), u, k, v)
    torch.testing.assert_close(wkv(k, v, u, w)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13])
def test_sums_that_fade_are_a_loop(tokens):
    generator = torch.Generator().manual_seed(1)
    a, x = (torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    h, sums = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(tokens):
        h = a[:, t] * h + x[:, t]
        sums.append(h)
    found, expected = decayed_sums(a, x), torch.stack(sums, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients((found,), (a, x)), gradients((expected,), (a, x)), rtol=1e-10, atol=1e-11)


def test_factors_of_several_sums_are_added_up():
    a = torch.rand(2, 9, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decayed_sums, (a, x))
