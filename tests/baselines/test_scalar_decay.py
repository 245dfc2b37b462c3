"""Chunks of linear attention with a decay for each head equal its recurrence, in values and gradients, for documents of any length."""

import pytest
import torch
from recurrences import gradients, recurrence, some_ids
from torch import Tensor

from based_megatron.baselines.operations.scalar_decay import scalar_decay, scalar_decay_step

B, T, H, K, V, SCALE = 3, 13, 2, 3, 4, 0.6


def some_inputs(dtype: torch.dtype = torch.float64, strength: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v, log decays and an initial state."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, H, K, V))
    q, k, v, g, state = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return tuple(x.requires_grad_() for x in (q, k, v, -strength * g.abs(), state))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_the_recurrence(chunk_tokens, packed):
    *inputs, state = some_inputs()
    ids = some_ids(B, T) if packed else None
    expected = recurrence(scalar_decay_step, tuple(inputs), state, ids, scale=SCALE)
    found = scalar_decay(*inputs, scale=SCALE, initial_state_BHKV=state, document_ids_BT=ids, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = (*inputs, state)
    torch.testing.assert_close(gradients(found, wanted), gradients(expected, wanted), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_function():
    *inputs, state = some_inputs()
    q, k, v, g = (x[:1, :5] for x in inputs)

    def outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return scalar_decay(q, k, v, -g.abs(), initial_state_BHKV=state, chunk_tokens=2)

    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v, g, state[:1]))
    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_what_decays_to_nothing_gives_no_infinity(packed):
    """Decays of exp(-1e4) a token: products of decays and their inverses would overflow."""
    *inputs, state = some_inputs(torch.float32, strength=1e4)
    ids = some_ids(B, T) if packed else None
    found = scalar_decay(*inputs, initial_state_BHKV=state, document_ids_BT=ids, chunk_tokens=8)
    expected = recurrence(scalar_decay_step, tuple(inputs), state, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in gradients(found, (*inputs, state)))


def test_activations_keep_their_dtype_and_states_are_wide():
    *inputs, _state = some_inputs(torch.bfloat16)
    o, state = scalar_decay(*inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = scalar_decay(*(x.double() for x in inputs))
    assert float((o - exact).detach().norm() / exact.detach().norm()) < 4e-3  # half a bf16 digit is 2e-3
