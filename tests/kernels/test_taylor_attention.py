"""Taylor attention against the quadratic form in fp64: values, gradients, states, documents, shards, decoding."""

import pytest
import torch
from kernel_oracles import assert_same_gradients, document_ids, recurrent_step, segment_state, taylor_oracle

from based_megatron.errors import ConfigError
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import start_sliced_attention, taylor_attention

FP64_TOLERANCE = 1e-11
TOKENS = [1, 15, 16, 17, 63, 64, 65, 130]
DOCUMENTS = ["none", "random", "chunk_starts", "single_tokens"]


def make_inputs(batch: int, tokens: int, heads: int = 2, feature_dim: int = 8, value_dim: int = 8, seed: int = 0):
    """q, k, v and a state that earlier tokens could have left, in fp64 with gradients."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, batch, tokens, heads, feature_dim, dtype=torch.float64).unbind(0)
    v = torch.randn(batch, tokens, heads, value_dim, dtype=torch.float64)
    earlier_k = torch.randn(batch, 9, heads, feature_dim, dtype=torch.float64)
    earlier_v = torch.randn(batch, 9, heads, value_dim, dtype=torch.float64)
    state = segment_state(earlier_k, earlier_v)
    return tuple(x.requires_grad_() for x in (q, k, v, state))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_quadratic_form(tokens: int, documents: str) -> None:
    q, k, v, state = make_inputs(3, tokens)
    ids = document_ids(documents, 3, tokens)
    outputs = taylor_attention(
        q, k, v, initial_state_BHRV=state, document_ids_BT=ids, return_final_state=True, chunk_tokens=16
    )
    assert_same_gradients(outputs, taylor_oracle(q, k, v, state, ids), (q, k, v, state), FP64_TOLERANCE)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_released_head_shape_with_any_chunk(chunk_tokens: int) -> None:
    q, k, v, state = make_inputs(1, 70, heads=1, feature_dim=16, value_dim=64)
    ids = document_ids("random", 1, 70)
    outputs = taylor_attention(
        q, k, v, initial_state_BHRV=state, document_ids_BT=ids, return_final_state=True, chunk_tokens=chunk_tokens
    )
    assert_same_gradients(outputs, taylor_oracle(q, k, v, state, ids), (q, k, v, state), FP64_TOLERANCE)


def test_default_chunk_without_state_or_documents() -> None:
    q, k, v, _ = make_inputs(2, 150)
    output, final_state = taylor_attention(q, k, v)
    assert final_state is None
    assert_same_gradients((output,), taylor_oracle(q, k, v, None, None)[:1], (q, k, v), FP64_TOLERANCE)


def test_gradcheck_through_both_outputs() -> None:
    q, k, v, state = make_inputs(2, 7, heads=1, feature_dim=3, value_dim=2)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, 2]])

    def op(q, k, v, state):
        return taylor_attention(
            q, k, v, initial_state_BHRV=state, document_ids_BT=ids, return_final_state=True, chunk_tokens=3
        )

    assert torch.autograd.gradcheck(op, (q, k, v, state))


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_gradient_from_the_final_state_alone(documents: str) -> None:
    q, k, v, state = make_inputs(2, 37)
    ids = document_ids(documents, 2, 37)
    _, final = taylor_attention(
        q, k, v, initial_state_BHRV=state, document_ids_BT=ids, return_final_state=True, chunk_tokens=16
    )
    _, expected = taylor_oracle(q, k, v, state, ids)
    assert_same_gradients((final,), (expected,), (k, v, state), FP64_TOLERANCE)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_final_state_from_zero(tokens: int, documents: str) -> None:
    _, k, v, _ = make_inputs(3, tokens)
    ids = document_ids(documents, 3, tokens)
    state = segment_state(k, v, ids, chunk_tokens=16)
    assert_same_gradients((state,), taylor_oracle(k, k, v, None, ids)[1:], (k, v), FP64_TOLERANCE)


def test_one_row_of_document_ids_serves_the_whole_batch() -> None:
    q, k, v, state = make_inputs(3, 37)
    ids = document_ids("random", 1, 37)
    assert ids is not None
    shared = taylor_attention(q, k, v, initial_state_BHRV=state, document_ids_BT=ids, chunk_tokens=16)[0]
    repeated = taylor_attention(q, k, v, initial_state_BHRV=state, document_ids_BT=ids.repeat(3, 1), chunk_tokens=16)[0]
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("documents", ["none", "random", "chunk_starts"])
def test_slices_with_states_equal_the_whole(documents: str) -> None:
    """Sequence parallelism in one process: segment states, a gated exclusive prefix sum, then the outputs."""
    batch, lengths = 3, [5, 1, 40, 16, 9]
    q, k, v, _ = make_inputs(batch, sum(lengths))
    ids = document_ids(documents, batch, sum(lengths))
    ids = torch.zeros(batch, sum(lengths), dtype=torch.int64) if ids is None else ids
    outputs, before, start = [], None, 0
    for length in lengths:
        part = slice(start, start + length)
        if before is not None:
            before = before * (ids[:, start - 1] == ids[:, start])[:, None, None, None]
        qs, ks, vs, slice_ids = q[:, part], k[:, part], v[:, part], ids[:, part]
        outputs.append(
            taylor_attention(qs, ks, vs, initial_state_BHRV=before, document_ids_BT=slice_ids, chunk_tokens=16)[0]
        )
        own = segment_state(ks, vs, slice_ids, chunk_tokens=16)
        flows_through = (slice_ids[:, 0] == slice_ids[:, -1])[:, None, None, None]
        before = own if before is None else own + before * flows_through
        start += length
    whole = taylor_attention(q, k, v, document_ids_BT=ids, chunk_tokens=16)[0]
    assert_same_gradients((torch.cat(outputs, dim=1),), (whole,), (q, k, v), FP64_TOLERANCE)


@pytest.mark.parametrize("changed", [0, 15, 16, 30])
def test_outputs_do_not_depend_on_later_tokens(changed: int) -> None:
    q, k, v, _ = (x.detach() for x in make_inputs(1, 40))
    before, _ = taylor_attention(q, k, v, chunk_tokens=16)
    k[:, changed] += 1
    v[:, changed] += 1
    after, _ = taylor_attention(q, k, v, chunk_tokens=16)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert ((before - after)[:, changed:].abs().amax((0, 2, 3)) > 1e-6).all()


def test_recurrent_steps_equal_the_chunked_form() -> None:
    q, k, v, state = (x.detach() for x in make_inputs(2, 21))
    expected, expected_state = taylor_attention(
        q, k, v, initial_state_BHRV=state, return_final_state=True, chunk_tokens=8
    )
    outputs, running = [], state
    for t in range(21):
        o, running = recurrent_step(q[:, t], k[:, t], v[:, t], running)
        outputs.append(o)
    torch.testing.assert_close(torch.stack(outputs, dim=1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(running, expected_state, rtol=1e-12, atol=1e-12)


def test_slices_of_a_fused_projection() -> None:
    """Strided q, k, v, as cut out of one projection, and a gradient that is an expanded scalar."""
    torch.manual_seed(0)
    fused = torch.randn(2, 19, 2, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split(8, dim=-1)
    (grad,) = torch.autograd.grad(taylor_attention(q, k, v, chunk_tokens=8)[0].sum(), fused)
    (expected,) = torch.autograd.grad(taylor_oracle(q, k, v, None, None)[0].sum(), fused)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


def test_rows_of_a_state_are_in_the_public_order() -> None:
    """Row 0 counts keys and sums values; the first-order rows follow; the last row is the last feature's square."""
    _, k, v, _ = (x.detach() for x in make_inputs(1, 12, heads=1, feature_dim=4, value_dim=3))
    state = segment_state(k, v)
    assert state.shape == (1, 1, packed_rows(4), 4)
    assert state[0, 0, 0, -1] == 12
    torch.testing.assert_close(state[0, 0, 0, :-1], v[0, :, 0].sum(0))
    torch.testing.assert_close(state[0, 0, 2, -1], k[0, :, 0, 1].sum())
    torch.testing.assert_close(state[0, 0, 6, -1], (k[0, :, 0, 0] * k[0, :, 0, 1]).sum())
    torch.testing.assert_close(state[0, 0, -1, 0], (k[0, :, 0, 3] ** 2 * v[0, :, 0, 0]).sum())


@pytest.mark.parametrize(
    "op", [taylor_attention, lambda q, k, v, backend: start_sliced_attention(k, v, None, backend=backend)]
)
def test_a_backend_that_is_not_built_is_refused(op) -> None:
    q, k, v, _ = make_inputs(1, 2)
    with pytest.raises(ConfigError, match=r"no 'cutlass' implementation.*train\.backend"):
        op(q, k, v, backend="cutlass")
