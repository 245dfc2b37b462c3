"""Sliding window and full attention against masked softmax over all pairs, in fp64; the kernels themselves compute in fp32."""

from typing import Any

import pytest
import torch
from kernel_oracles import LargestTensor, assert_same_gradients, attention_oracle, document_ids
from torch import Tensor

from based_megatron.kernels.full_attention import full_attention
from based_megatron.kernels.sliding_window import sliding_window_attention

FP64_TOLERANCE = 1e-11
# Roundings of fp32, also where the terms of a gradient cancel.
CLOSE = {"reference": {"tolerance": FP64_TOLERANCE}, "triton": {"tolerance": 1e-5, "floor": 1.0}}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs(batch: int, tokens: int, halo: int = 0, heads: int = 2, value_dim: int = 8):
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, heads, value_dim, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(batch, halo + tokens, heads, value_dim, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    return q, k, v


def window(backend: str, q: Tensor, k: Tensor, v: Tensor, window_left: int, ids: Tensor | None = None) -> Tensor:
    """The op of fp64 tensors on the CPU: in fp64 in the reference, in fp32 on the kernels' device in Triton."""
    dtype, device = (torch.float64, "cpu") if backend == "reference" else (torch.float32, DEVICE)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    ids = None if ids is None else ids.to(device)
    o = sliding_window_attention(q, k, v, window_left=window_left, key_document_ids_BS=ids, backend=backend)
    assert o.dtype == dtype
    return o.to("cpu", torch.float64)


def attention(op: str, *tensors: Tensor, window_left: int, ids: Tensor | None = None) -> Tensor:
    """`op` is full, or the backend of the window."""
    return full_attention(*tensors, key_document_ids_BS=ids) if op == "full" else window(op, *tensors, window_left, ids)


# Interpreted kernels take a fraction of a second each, so they run fewer of the combinations.
SIZES = [("reference", T, W) for T in (1, 15, 16, 17, 63, 64, 65, 130) for W in (0, 1, 16, 100, 500)]
SIZES += [("triton", T, 16) for T in (1, 15, 16, 17, 63, 64, 65, 129)]
SIZES += [("triton", 63, 0), ("triton", 65, 1), ("triton", 129, 100), ("triton", 64, 500)]


@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize(("backend", "tokens", "window_left"), SIZES)
def test_window_equals_masked_softmax(backend: str, tokens: int, window_left: int, documents: str) -> None:
    q, k, v = make_inputs(2, tokens)
    ids = document_ids(documents, 2, tokens)
    output = window(backend, q, k, v, window_left, ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, window_left, ids),), (q, k, v), **CLOSE[backend])


@pytest.mark.parametrize(("head_dim", "tokens"), [(16, 33), (64, 50), (112, 33)])
def test_head_dims_of_the_kernels(head_dim: int, tokens: int) -> None:
    q, k, v = make_inputs(1, tokens, halo=5, heads=2, value_dim=head_dim)
    ids = document_ids("random", 1, 5 + tokens)
    output = window("triton", q, k, v, 20, ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, 20, ids),), (q, k, v), **CLOSE["triton"])


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("halo", [1, 15, 16, 23, 40])
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_window_with_keys_in_front(tokens: int, halo: int, documents: str, backend: str) -> None:
    """There are fewer, exactly window_left and more keys than the first query can see; gradients of the halo are checked too."""
    q, k, v = make_inputs(2, tokens, halo, heads=1)
    ids = document_ids(documents, 2, halo + tokens)
    output = window(backend, q, k, v, 16, ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, 16, ids),), (q, k, v), **CLOSE[backend])


@pytest.mark.parametrize("op", ["reference", "triton", "full"])
def test_keys_that_do_not_exist_are_masked(op: str) -> None:
    """A halo of id -1, as on the first rank of a sequence, must not matter whatever it holds."""
    q, k, v = make_inputs(1, 20, halo=8)
    ids = torch.tensor([[-1] * 8 + [0] * 20])
    with torch.no_grad():
        k[:, :8], v[:, :8] = 50.0, 1e4
    output = attention(op, q, k, v, window_left=8, ids=ids)
    expected = attention(op, q, k[:, 8:], v[:, 8:], window_left=8)
    assert_same_gradients((output,), (expected,), (q, k, v), **CLOSE.get(op, CLOSE["reference"]))


@pytest.mark.parametrize("op", ["reference", "triton", "full"])
def test_padding_queries_stay_finite(op: str) -> None:
    """Rows padded on the left hold queries of id -1: they see themselves, and no gradient turns NaN."""
    q, k, v = make_inputs(1, 12)
    output = attention(op, q, k, v, window_left=3, ids=torch.tensor([[-1] * 5 + [0] * 7]))
    torch.testing.assert_close(output[:, :5], v[:, :5], rtol=1e-6, atol=1e-6)
    output[:, 5:].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@BACKENDS
@pytest.mark.parametrize("query", [8, 70, 129])
def test_window_reaches_exactly_window_left_keys(query: int, backend: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(1, 130))
    before = window(backend, q, k, v, 8)

    def changes(key: int) -> bool:
        changed = v.clone()
        changed[:, key] += 1
        return not torch.equal(before[:, query], window(backend, q, k, changed, 8)[:, query])

    assert changes(query - 8) and changes(query)
    assert query == 8 or not changes(query - 9)
    assert query == 129 or not changes(query + 1)


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random"])
def test_window_in_shards_with_halos_equals_the_whole(documents: str, backend: str) -> None:
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
        outputs.append(window(backend, q[:, start:end], padded_k[:, keys], padded_v[:, keys], window_left, shard_ids))
        start = end
    whole = window(backend, q, k, v, window_left, ids)
    assert_same_gradients((torch.cat(outputs, dim=1),), (whole,), (q, k, v), **CLOSE[backend])


@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("halo", [0, 1, 30])
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_full_attention_equals_masked_softmax(tokens: int, halo: int, documents: str) -> None:
    q, k, v = make_inputs(2, tokens, halo)
    ids = document_ids(documents, 2, halo + tokens)
    output = full_attention(q, k, v, key_document_ids_BS=ids)
    assert_same_gradients((output,), (attention_oracle(q, k, v, None, ids),), (q, k, v), FP64_TOLERANCE)


@BACKENDS
def test_slices_of_a_fused_projection(backend: str) -> None:
    """Tokens outermost in memory, heads of q, k and v side by side, as the model's projection leaves them."""
    torch.manual_seed(0)
    fused = torch.randn(70, 2, 3 * 16, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.transpose(0, 1).unflatten(-1, (2, 8)) for x in fused.chunk(3, dim=-1))
    output = window(backend, q, k, v, 5)
    assert_same_gradients((output,), (attention_oracle(q, k, v, 5, None),), (fused,), **CLOSE[backend])


@BACKENDS
def test_each_input_has_its_own_layout(backend: str) -> None:
    """Queries batch first, keys with tokens outermost, values with heads outermost."""
    q, k, v = make_inputs(2, 40, halo=7)
    k_tokens_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    v_heads_first = v.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    output = window(backend, q, k_tokens_first, v_heads_first, 9)
    assert_same_gradients((output,), (attention_oracle(q, k, v, 9, None),), (q, k, v), **CLOSE[backend])


@BACKENDS
def test_one_row_of_document_ids_serves_the_whole_batch(backend: str) -> None:
    q, k, v = make_inputs(3, 70)
    ids = document_ids("random", 1, 70)
    assert ids is not None
    shared, repeated = window(backend, q, k, v, 5, ids), window(backend, q, k, v, 5, ids.repeat(3, 1))
    assert torch.equal(shared, repeated)


def relative_errors(q: Tensor, k: Tensor, v: Tensor, window_left: int, ids: Tensor | None) -> list[float]:
    """Relative L2 errors of o, dq, dk, dv of the Triton kernels in the dtype of q, against fp64 of the same numbers."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in (q, k, v)]
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    device_ids = None if ids is None else ids.to(DEVICE)
    o = sliding_window_attention(*leaves, window_left=window_left, key_document_ids_BS=device_ids, backend="triton")
    exact = attention_oracle(*exact_leaves, window_left, ids)
    do = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(q.dtype)
    grads = torch.autograd.grad(o, leaves, do.to(DEVICE))
    exact_grads = torch.autograd.grad(exact, exact_leaves, do.double())
    pairs: list[Any] = list(zip([o, *grads], [exact, *exact_grads], strict=True))
    assert all(got.dtype == q.dtype for got, _ in pairs)
    return [((got.double().cpu() - want).norm() / want.norm()).item() for got, want in pairs]


@pytest.mark.parametrize(
    ("tokens", "halo", "head_dim", "documents"),
    [
        (200, 0, 64, "none"),
        (129, 40, 64, "random"),
        (65, 7, 112, "random"),
        (17, 0, 128, "none"),
        (70, 3, 16, "random"),
    ],
)
def test_bf16_values_and_gradients_of_the_kernels(tokens: int, halo: int, head_dim: int, documents: str) -> None:
    q, k, v = (x.detach().to(torch.bfloat16) for x in make_inputs(1, tokens, halo, heads=1, value_dim=head_dim))
    errors = torch.tensor(relative_errors(q, k, v, 32, document_ids(documents, 1, halo + tokens)))
    assert (errors <= torch.tensor([3e-3, 5e-3, 4e-3, 4e-3])).all(), errors


def test_the_kernels_give_the_same_bits_in_every_run() -> None:
    q, k, v = (x.detach().to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(1, 130, 9, heads=1))

    def run() -> list[Tensor]:
        o = sliding_window_attention(q, k, v, window_left=20, backend="triton")
        return [o, *torch.autograd.grad(o.sum(), (q, k, v))]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("tokens_outermost", [True, False])
def test_the_output_of_the_kernels_is_laid_out_like_the_queries(tokens_outermost: bool) -> None:
    """The next projection then reads it in place."""
    fused = torch.randn(2, 20, 3 * 16, device=DEVICE)
    if tokens_outermost:
        fused = fused.transpose(0, 1).contiguous().transpose(0, 1)
    q, k, v = (x.unflatten(-1, (2, 8)) for x in fused.chunk(3, dim=-1))
    o = sliding_window_attention(q, k, v, window_left=4, backend="triton")
    assert (o.transpose(0, 1) if tokens_outermost else o).is_contiguous()


# bf16 rounds the probabilities as well as the result, as every flash kernel does.
@pytest.mark.parametrize("documents", ["none", "random"])
def test_bf16_error_against_fp64_is_rounding_alone(documents: str) -> None:
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
