"""Chunks of diagonal plus rank one transitions equal their recurrence and the delta rules that they contain, with states and documents."""

import pytest
import torch
from recurrences import gradients, recurrence, some_ids
from torch import Tensor
from torch.nn import functional

from based_megatron.baselines.operations.delta import delta_rule
from based_megatron.baselines.operations.dplr import dplr, dplr_step

B, T, H, K, V = 3, 13, 2, 3, 4
SMALLEST_LOG_DECAY = -0.6065306597126334
"""The bound of RWKV-7, -e^(-1/2)."""


def some_inputs(tokens: int = T, dtype: torch.dtype = torch.float64, key_dim: int = K) -> tuple[Tensor, ...]:
    """q, k, v, a, b, log decays and an initial state, as RWKV-7 has them."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (B, tokens, H, key_dim), (B, tokens, H, V)
    shapes = (keys, keys, values, keys, keys, keys, (B, H, key_dim, V))
    q, k, v, kk, rate, w, state = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    kk = functional.normalize(kk, dim=-1)
    inputs = (q, k, v, -kk, kk * rate.sigmoid(), SMALLEST_LOG_DECAY * (3 * w).sigmoid(), state)
    return tuple(x.requires_grad_() for x in inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 13, 64])
def test_chunks_equal_the_recurrence(chunk_tokens, packed):
    *inputs, state = some_inputs()
    ids = some_ids(B, T) if packed else None
    options = {"document_ids_BT": ids, "return_final_state": True, "chunk_tokens": chunk_tokens}
    found = dplr(*inputs, initial_state_BHKV=state, **options)
    expected = recurrence(dplr_step, tuple(inputs), state, ids)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    every = (*inputs, state)
    torch.testing.assert_close(gradients(found, every), gradients(expected, every), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_tokens", [5, 13])
def test_without_states(chunk_tokens, packed):
    """The short form of a single chunk is among them."""
    *inputs, state = some_inputs()
    ids = some_ids(B, T) if packed else None
    found, final = dplr(*inputs, document_ids_BT=ids, chunk_tokens=chunk_tokens)
    expected, _ = recurrence(dplr_step, tuple(inputs), torch.zeros_like(state), ids)
    assert final is None
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        gradients((found,), tuple(inputs)), gradients((expected,), tuple(inputs)), rtol=1e-10, atol=1e-11
    )


def test_finite_differences():
    *inputs, state = (x.detach()[:1] for x in some_inputs(4, key_dim=2))
    every = tuple(x.requires_grad_() for x in (*inputs, state))
    assert torch.autograd.gradcheck(
        lambda *x: dplr(*x[:-1], initial_state_BHKV=x[-1], return_final_state=True, chunk_tokens=2), every
    )


def test_the_delta_rules_are_special_cases():
    """a = -e^g k for a decay e^g of all keys alike, and b = beta k, where k is also what is written."""
    q, k, v, _, rate, w, _ = (x.detach() for x in some_inputs())
    k, beta, g = functional.normalize(k, dim=-1), rate[..., 0].sigmoid(), w[..., 0]
    found, _ = dplr(q, beta[..., None] * k, v, -g.exp()[..., None] * k, beta[..., None] * k, g[..., None].expand_as(k))
    torch.testing.assert_close(found, delta_rule(q, k, v, beta, g)[0], rtol=1e-11, atol=1e-11)


def test_the_strongest_decay_of_rwkv7_is_exact_in_fp32():
    """Factors reach e^20 in a chunk of 64 tokens, and e^39 where pairs are hidden."""
    *inputs, _ = (x.detach() for x in some_inputs(130, torch.float32, key_dim=16))
    inputs[5] = torch.full_like(inputs[5], SMALLEST_LOG_DECAY)
    inputs = [x.requires_grad_() for x in inputs]
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    found, expected = dplr(*inputs)[0], dplr(*exact, chunk_tokens=1)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    for got, wanted in zip(gradients((found.double(),), tuple(inputs)), gradients((expected,), exact), strict=True):
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_bf16_goes_in_and_out_and_states_are_wide():
    *inputs, state = some_inputs(dtype=torch.bfloat16)
    o, final = dplr(*inputs, initial_state_BHKV=state, return_final_state=True)
    assert final is not None and (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = dplr(*(x.double() for x in inputs), initial_state_BHKV=state.double())
    assert float((o - exact).detach().norm() / exact.detach().norm()) < 4e-3  # half a bf16 digit is 2e-3


@pytest.mark.slow
def test_it_is_the_naive_form_of_fla():
    """fla-core, if it is installed; importing it takes a quarter of a minute."""
    pytest.importorskip("fla.ops")
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    q, k, v, a, b, w, _ = (x.detach().float() for x in some_inputs(100))
    heads_first = [x.transpose(1, 2) for x in (q, k, v, a, b, w)]
    expected = dplr_recurrence(*heads_first)[0].transpose(1, 2)
    torch.testing.assert_close(dplr(q * K**-0.5, k, v, a, b, w)[0], expected, rtol=1e-4, atol=1e-5)
