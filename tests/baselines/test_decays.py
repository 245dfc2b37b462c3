"""Chunks of linear attention with decays, of each head or of each key channel, equal their recurrence, whatever the documents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from recurrences import gradients, recurrence, some_ids
from torch import Tensor

from based_megatron.baselines.operations.scalar_decay import scalar_decay, scalar_decay_step
from based_megatron.baselines.operations.vector_decay import vector_decay, vector_decay_step

B, T, H, K, V, SCALE = 3, 13, 2, 3, 4, 0.6


@dataclass(frozen=True)
class Case:
    """An operation, its recurrence, and the shape of its log decays."""

    run: Callable[..., Any]
    step: Callable[..., Any]
    decays: tuple[int, ...]


CASES = {
    "scalar": Case(scalar_decay, scalar_decay_step, (B, T, H)),
    "vector": Case(vector_decay, vector_decay_step, (B, T, H, K)),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def some_inputs(case: Case, dtype: torch.dtype = torch.float64, strength: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v, log decays and an initial state."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V), case.decays, (B, H, K, V))
    q, k, v, g, state = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return tuple(x.requires_grad_() for x in (q, k, v, -strength * g.abs(), state))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_the_recurrence(case, chunk_tokens, packed):
    *inputs, state = some_inputs(case)
    ids = some_ids(B, T) if packed else None
    expected = recurrence(case.step, tuple(inputs), state, ids, scale=SCALE)
    found = case.run(*inputs, scale=SCALE, initial_state_BHKV=state, document_ids_BT=ids, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = (*inputs, state)
    torch.testing.assert_close(gradients(found, wanted), gradients(expected, wanted), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_function(case):
    *inputs, state = some_inputs(case)
    q, k, v, g = (x[:1, :5] for x in inputs)

    def outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(q, k, v, -g.abs(), initial_state_BHKV=state, chunk_tokens=2)

    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v, g, state[:1]))
    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_what_decays_to_nothing_gives_no_infinity(case, packed):
    """Decays of exp(-1e4) a token: products of decays and their inverses would overflow."""
    *inputs, state = some_inputs(case, torch.float32, strength=1e4)
    ids = some_ids(B, T) if packed else None
    found = case.run(*inputs, initial_state_BHKV=state, document_ids_BT=ids, chunk_tokens=8)
    expected = recurrence(case.step, tuple(inputs), state, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in gradients(found, (*inputs, state)))


def test_activations_keep_their_dtype_and_states_are_wide(case):
    *inputs, _state = some_inputs(case, torch.bfloat16)
    o, state = case.run(*inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = case.run(*(x.double() for x in inputs))
    assert float((o - exact).detach().norm() / exact.detach().norm()) < 4e-3  # half a bf16 digit is 2e-3


def test_equal_channels_are_a_scalar_decay():
    q, k, v, g, state = some_inputs(CASES["vector"])
    found = vector_decay(q, k, v, g[..., :1].expand_as(g), initial_state_BHKV=state)
    expected = scalar_decay(q, k, v, g[..., 0], initial_state_BHKV=state)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
