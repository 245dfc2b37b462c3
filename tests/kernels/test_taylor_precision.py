"""Dtypes and memory of Taylor attention: bf16 inputs, fp32 sums, memory linear in the sequence."""

import pytest
import torch
from kernel_oracles import LargestTensor, recurrent_step, saved_elements, segment_state, taylor_oracle

from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import taylor_attention


def make_inputs(tokens: int, dtype: torch.dtype, heads: int = 2, feature_dim: int = 16, value_dim: int = 16):
    torch.manual_seed(0)
    shapes = ((1, tokens, heads, feature_dim), (1, tokens, heads, feature_dim), (1, tokens, heads, value_dim))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


# One rounding of the result to bf16 costs about 1.7e-3 in L2; the gradients also see the rounding of the saved output.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float32, 5e-6)])
def test_error_against_fp64_is_rounding_alone(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(600, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    output, _ = taylor_attention(*inputs)
    exact, _ = taylor_oracle(*exact_inputs)
    assert output.dtype == dtype
    assert relative_error(output, exact) <= tolerance
    cotangent = torch.randn(exact.shape).to(dtype)
    grads = torch.autograd.grad(output, inputs, cotangent)
    for grad, expected in zip(grads, torch.autograd.grad(exact, exact_inputs, cotangent.double()), strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, expected) <= tolerance


def test_bf16_rounds_only_the_result() -> None:
    """A normaliser, state or feature in bf16 would change many more results than this by a bf16 step."""
    inputs = make_inputs(600, torch.bfloat16)
    exact, _ = taylor_oracle(*(x.detach().double() for x in inputs))
    rounded = exact.to(torch.bfloat16)
    differing = (taylor_attention(*inputs)[0] != rounded).double().mean()
    assert differing < 2e-3


def test_states_of_bf16_inputs_are_fp32() -> None:
    q, k, v = make_inputs(20, torch.bfloat16)
    _, state = taylor_attention(q, k, v, return_final_state=True)
    assert state is not None and state.dtype == torch.float32


def test_key_count_is_exact_after_100k_tokens() -> None:
    tokens = 100_000
    q, k, v = (x.detach() for x in make_inputs(tokens, torch.bfloat16, heads=1, feature_dim=8, value_dim=4))
    output, state = taylor_attention(q, k, v, return_final_state=True, chunk_tokens=256)
    assert state is not None and state[0, 0, 0, -1] == tokens
    # All moments, not only the integer one: fp32 sums in chunks stay close to fp64.
    exact_state = segment_state(k.double(), v.double(), chunk_tokens=256)
    assert relative_error(state, exact_state) < 1e-5
    last, _ = recurrent_step(q[:, -1].double(), k[:, -1].double() * 0, v[:, -1].double() * 0, exact_state)
    assert torch.isfinite(output).all()
    # The extra zero key above adds one to the normaliser of 1e5.
    assert relative_error(output[:, -1], last) < 5e-3


def test_autocast_does_not_reach_the_sums() -> None:
    q, k, v = make_inputs(100, torch.float32)
    plain, plain_state = taylor_attention(q, k, v, return_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = taylor_attention(q, k, v, return_final_state=True)
    assert plain_state is not None and state is not None
    assert torch.equal(output, plain) and torch.equal(state, plain_state)


def test_no_tensor_grows_with_the_square_or_with_the_features() -> None:
    """Forward and backward: the largest tensor is an input, a state or one chunk, never T x T and never T x R."""
    tokens, heads, width = 2048, 1, 16
    q, k, v = make_inputs(tokens, torch.float32, heads, width, width)
    with LargestTensor() as largest:
        output, state = taylor_attention(q, k, v, return_final_state=True)
        (output.sum() + state.sum()).backward()
    assert largest.elements <= tokens * heads * width < tokens * packed_rows(width) // 8


def test_saved_for_backward_is_linear_without_features() -> None:
    tokens, heads, width = 1024, 1, 16
    q, k, v = make_inputs(tokens, torch.float32, heads, width, width)
    saved = saved_elements(lambda: taylor_attention(q, k, v, return_final_state=True))
    inputs_and_output = 4 * tokens * heads * width
    normaliser_and_ids = tokens * heads + tokens
    assert saved <= inputs_and_output + normaliser_and_ids + packed_rows(width) * (width + 1) * heads
