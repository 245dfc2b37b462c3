"""Sliding window and full attention against masked softmax over all pairs, in fp64."""

import pytest
import torch
from kernel_oracles import LargestTensor, assert_same_gradients, attention_oracle, document_ids

from based_megatron.kernels.sliding_window import full_attention, sliding_window_attention

FP64_TOLERANCE = 1e-11


def make_inputs(batch: int, tokens: int, halo: int = 0, heads: int = 2, value_dim: int = 8):
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, heads, value_dim, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(batch, halo + tokens, heads, value_dim, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    return q, k, v


@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize("window_left", [0, 1, 16, 100, 500])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 130])
def test_window_equals_masked_softmax(tokens: int, window_left: int, documents: str) -> None:
    q, k, v = make_inputs(2, tokens)
    ids = document_ids(documents, 2, tokens)
    output = sliding_window_attention(q, k, v, window_left=window_left, key_document_ids_BS=ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, window_left, ids),), (q, k, v), FP64_TOLERANCE)


@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("halo", [1, 15, 16, 23])
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_window_with_keys_in_front(tokens: int, halo: int, documents: str) -> None:
    """Fewer, exactly window_left and more keys than the first query can see."""
    q, k, v = make_inputs(2, tokens, halo)
    ids = document_ids(documents, 2, halo + tokens)
    output = sliding_window_attention(q, k, v, window_left=16, key_document_ids_BS=ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, 16, ids),), (q, k, v), FP64_TOLERANCE)


@pytest.mark.parametrize("op", ["window", "full"])
def test_keys_that_do_not_exist_are_masked(op: str) -> None:
    """A halo of id -1, as on the first rank of a sequence, must not matter whatever it holds."""
    q, k, v = make_inputs(1, 20, halo=8)
    ids = torch.tensor([[-1] * 8 + [0] * 20])
    with torch.no_grad():
        k[:, :8], v[:, :8] = 50.0, 1e4
    if op == "window":
        output = sliding_window_attention(q, k, v, window_left=8, key_document_ids_BS=ids)
        expected = sliding_window_attention(q, k[:, 8:], v[:, 8:], window_left=8)
    else:
        output = full_attention(q, k, v, key_document_ids_BS=ids)
        expected = full_attention(q, k[:, 8:], v[:, 8:])
    assert_same_gradients((output,), (expected,), (q, k, v), FP64_TOLERANCE)


@pytest.mark.parametrize("op", ["window", "full"])
def test_padding_queries_stay_finite(op: str) -> None:
    """Rows padded on the left hold queries of id -1: they see themselves, and no gradient turns NaN."""
    q, k, v = make_inputs(1, 12)
    ids = torch.tensor([[-1] * 5 + [0] * 7])
    if op == "window":
        output = sliding_window_attention(q, k, v, window_left=3, key_document_ids_BS=ids)
    else:
        output = full_attention(q, k, v, key_document_ids_BS=ids)
    torch.testing.assert_close(output[:, :5], v[:, :5])
    output[:, 5:].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("query", [8, 70, 129])
def test_window_reaches_exactly_window_left_keys(query: int) -> None:
    q, k, v = (x.detach() for x in make_inputs(1, 130))
    before = sliding_window_attention(q, k, v, window_left=8)

    def changes(key: int) -> bool:
        changed = v.clone()
        changed[:, key] += 1
        after = sliding_window_attention(q, k, changed, window_left=8)
        return not torch.equal(before[:, query], after[:, query])

    assert changes(query - 8) and changes(query)
    assert query == 8 or not changes(query - 9)
    assert query == 129 or not changes(query + 1)


@pytest.mark.parametrize("documents", ["none", "random"])
def test_window_in_shards_with_halos_equals_the_whole(documents: str) -> None:
    window_left, lengths = 8, [5, 1, 40, 3, 30]
    tokens = sum(lengths)
    q, k, v = make_inputs(2, tokens)
    ids = document_ids(documents, 2, tokens)
    ids = torch.zeros(2, tokens, dtype=torch.int64) if ids is None else ids
    pad = torch.full((2, window_left), -1)
    outputs, start = [], 0
    for length in lengths:
        end = start + length
        padded_k, padded_v = (torch.nn.functional.pad(x, (0, 0, 0, 0, window_left, 0), value=9.0) for x in (k, v))
        keys = slice(start, end + window_left)
        shard_ids = torch.cat([pad, ids], dim=1)[:, keys]
        outputs.append(
            sliding_window_attention(
                q[:, start:end],
                padded_k[:, keys],
                padded_v[:, keys],
                window_left=window_left,
                key_document_ids_BS=shard_ids,
            )
        )
        start = end
    whole = sliding_window_attention(q, k, v, window_left=window_left, key_document_ids_BS=ids)
    assert_same_gradients((torch.cat(outputs, dim=1),), (whole,), (q, k, v), FP64_TOLERANCE)


@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("halo", [0, 1, 30])
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_full_attention_equals_masked_softmax(tokens: int, halo: int, documents: str) -> None:
    q, k, v = make_inputs(2, tokens, halo)
    ids = document_ids(documents, 2, halo + tokens)
    output = full_attention(q, k, v, key_document_ids_BS=ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, None, ids),), (q, k, v), FP64_TOLERANCE)


def test_slices_of_a_fused_projection() -> None:
    torch.manual_seed(0)
    fused = torch.randn(2, 70, 2, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split(8, dim=-1)
    output = sliding_window_attention(q, k, v, window_left=5)
    assert_same_gradients((output,), (attention_oracle(q, k, v, 5, None),), (fused,), FP64_TOLERANCE)


def test_one_row_of_document_ids_serves_the_whole_batch() -> None:
    q, k, v = make_inputs(3, 70)
    ids = document_ids("random", 1, 70)
    assert ids is not None
    shared = sliding_window_attention(q, k, v, window_left=5, key_document_ids_BS=ids)
    repeated = sliding_window_attention(q, k, v, window_left=5, key_document_ids_BS=ids.repeat(3, 1))
    assert torch.equal(shared, repeated)


# bf16 rounds the probabilities as well as the result, as every flash kernel does.
@pytest.mark.parametrize("documents", ["none", "random"])
def test_bf16_error_against_fp64(documents: str) -> None:
    q, k, v = (x.detach().to(torch.bfloat16) for x in make_inputs(1, 200, value_dim=64))
    ids = document_ids(documents, 1, 200)
    exact = attention_oracle(q.double(), k.double(), v.double(), 32, ids)
    output = sliding_window_attention(q, k, v, window_left=32, key_document_ids_BS=ids)
    assert output.dtype == torch.bfloat16
    assert (output.double() - exact).norm() / exact.norm() <= 5e-3


def test_window_memory_is_linear() -> None:
    tokens, window_left = 4096, 64
    q, k, v = (
        torch.randn(1, tokens, 1, 8, requires_grad=True, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    with LargestTensor() as largest:
        sliding_window_attention(q, k, v, window_left=window_left).sum().backward()
    assert largest.elements <= tokens * 2 * window_left


def test_a_window_longer_than_the_sequence_costs_no_more_than_the_sequence() -> None:
    q, k, v = make_inputs(1, 20, heads=1)
    with LargestTensor() as largest:
        sliding_window_attention(q, k, v, window_left=1_000_000).sum().backward()
    assert largest.elements <= 20 * 40
