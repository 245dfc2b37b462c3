"""The chunked delta rules equal their recurrence and two other implementations, in values and gradients, with states and documents."""

import inspect

import pytest
import torch
from recurrences import gradients, recurrence, some_ids
from torch import Tensor
from torch.nn import functional

from based_megatron.baselines.operations.delta import delta_rule, delta_step

B, T, H, K, V, SCALE = 3, 13, 2, 3, 4, 0.6


def some_inputs(tokens: int = T, dtype: torch.dtype = torch.float64, strength: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v, beta, log decays and an initial state."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, tokens, H, K), (B, tokens, H, K), (B, tokens, H, V), (B, tokens, H), (B, tokens, H), (B, H, K, V))
    q, k, v, beta, g, state = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    inputs = (q, functional.normalize(k, dim=-1), v, beta.sigmoid(), -strength * g.abs(), state)
    return tuple(x.requires_grad_() for x in inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 13, 64])
def test_chunks_equal_the_recurrence(chunk_tokens, packed):
    *inputs, state = some_inputs()
    ids = some_ids(B, T) if packed else None
    found = delta_rule(
        *inputs,
        scale=SCALE,
        initial_state_BHKV=state,
        document_ids_BT=ids,
        return_final_state=True,
        chunk_tokens=chunk_tokens,
    )
    expected = recurrence(delta_step, tuple(inputs), state, ids, scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    every = (*inputs, state)
    torch.testing.assert_close(gradients(found, every), gradients(expected, every), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_tokens", [5, 13])
def test_without_states_and_decays(chunk_tokens, packed):
    """The short form of a single chunk is among them, and a decay of 0 is none."""
    q, k, v, beta, _g, state = some_inputs()
    ids, none = some_ids(B, T) if packed else None, torch.zeros(B, T, H, dtype=torch.float64)
    found, final = delta_rule(q, k, v, beta, document_ids_BT=ids, chunk_tokens=chunk_tokens)
    expected, _ = recurrence(delta_step, (q, k, v, beta, none), torch.zeros_like(state), ids)
    assert final is None
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    every = (q, k, v, beta)
    torch.testing.assert_close(gradients((found,), every), gradients((expected,), every), rtol=1e-10, atol=1e-11)


def test_finite_differences():
    inputs = tuple(x.detach()[:1, :5].requires_grad_() if x.ndim > 3 or x.shape[1] == T else x for x in some_inputs())
    state = inputs[-1].detach()[:1, :, :, :2].requires_grad_()
    q, k, v, beta, g = inputs[:-1]

    def op(q, k, v, beta, g, state):
        return delta_rule(q, k, v[..., :2], beta, g, initial_state_BHKV=state, return_final_state=True, chunk_tokens=3)

    assert torch.autograd.gradcheck(op, (q, k, v, beta, g, state))


@pytest.mark.parametrize("packed", [False, True])
def test_one_key_repeated_and_any_decay_stay_exact_in_fp32(packed):
    """Powers of a chunk's pairs would reach 10^18 here; log decays of -1000 a token would overflow if factors were split."""
    torch.manual_seed(0)
    k = functional.normalize(torch.randn(2, 1, 1, 8), dim=-1).expand(2, 128, 1, 8)
    v, g = torch.randn(2, 128, 1, 4), -1000 * torch.rand(2, 128, 1).gt(0.9).float()
    beta, ids = torch.ones(2, 128, 1), some_ids(2, 128) if packed else None
    inputs = tuple(x.clone().requires_grad_() for x in (k, k, v, beta, g))
    found, _ = delta_rule(*inputs, document_ids_BT=ids)
    torch.testing.assert_close(found, v, rtol=1e-4, atol=1e-4)  # what a key is asked for is what was written last
    assert all(x.isfinite().all() for x in gradients((found,), inputs))


def test_bf16_goes_in_and_out_and_states_are_wide():
    *inputs, state = some_inputs(dtype=torch.bfloat16)
    o, final = delta_rule(*inputs, initial_state_BHKV=state, return_final_state=True)
    assert final is not None and (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = delta_rule(*(x.double() for x in inputs), initial_state_BHKV=state.double())
    assert float((o - exact).detach().norm() / exact.detach().norm()) < 4e-3  # half a bf16 digit is 2e-3


@pytest.mark.parametrize("decaying", [False, True])
def test_it_is_the_gated_delta_rule_of_transformers(decaying):
    """`torch_chunk_gated_delta_rule` of Qwen3-Next, which scales queries by 1 / sqrt(K) itself."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, g, _ = (x.detach().float() for x in some_inputs(100))
    g = g if decaying else torch.zeros_like(g)
    # Where fla-core is installed the function of that name calls it, on a GPU only.
    expected, _ = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)(q, k, v, g=g, beta=beta)
    found, _ = delta_rule(q, k, v, beta, g if decaying else None, scale=K**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_is_the_naive_form_of_fla():
    """fla-core, if it is installed; importing it takes a quarter of a minute."""
    pytest.importorskip("fla.ops")
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    q, k, v, beta, g, _ = (x.detach().float() for x in some_inputs(100))
    heads_first = [x.transpose(1, 2) for x in (q, k, v, beta)]
    expected = delta_rule_recurrence(*heads_first)[0].transpose(1, 2)
    torch.testing.assert_close(delta_rule(q, k, v, beta, scale=K**-0.5)[0], expected, rtol=1e-4, atol=1e-5)
    expected = naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0]
    torch.testing.assert_close(delta_rule(q, k, v, beta, g, scale=K**-0.5)[0], expected, rtol=1e-4, atol=1e-5)
