"""The gated convolution against a loop over tokens and taps, in fp64."""

import pytest
import torch
from kernel_oracles import assert_same_gradients, conv_oracle, document_ids, saved_elements

from based_megatron.kernels.gated_conv import gated_conv

FP64_TOLERANCE = 1e-12


def make_inputs(batch: int, tokens: int, taps: int = 3, channels: int = 5):
    torch.manual_seed(0)
    u, gate = (torch.randn(batch, tokens, channels, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(channels, taps, dtype=torch.float64, requires_grad=True)
    halo = torch.randn(batch, taps - 1, channels, dtype=torch.float64, requires_grad=True)
    return u, gate, weight, halo


@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 65])
def test_equals_the_loop(tokens: int, taps: int, documents: str) -> None:
    u, gate, weight, _ = make_inputs(2, tokens, taps)
    ids = document_ids(documents, 2, tokens)
    output = gated_conv(u, gate, weight, key_document_ids_BS=ids)
    assert_same_gradients((output,), (conv_oracle(u, gate, weight, None, ids),), (u, gate, weight), FP64_TOLERANCE)


@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_halo_values_and_gradients(tokens: int, documents: str) -> None:
    u, gate, weight, halo = make_inputs(2, tokens)
    ids = document_ids(documents, 2, 2 + tokens)
    output = gated_conv(u, gate, weight, halo_BhD=halo, key_document_ids_BS=ids)
    expected = conv_oracle(u, gate, weight, halo, ids)
    assert_same_gradients((output,), (expected,), (u, gate, weight, halo), FP64_TOLERANCE)


def test_inputs_that_do_not_exist_count_as_zero() -> None:
    u, gate, weight, halo = make_inputs(1, 4)
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0]])
    output = gated_conv(u, gate, weight, halo_BhD=halo, key_document_ids_BS=ids)
    torch.testing.assert_close(output, gated_conv(u, gate, weight))
    (halo_grad,) = torch.autograd.grad(output.sum(), halo)
    assert not halo_grad.any()


def test_padding_outputs_are_zero() -> None:
    u, gate, weight, _ = make_inputs(1, 6)
    ids = torch.tensor([[-1, -1, -1, 0, 0, 0]])
    output = gated_conv(u, gate, weight, key_document_ids_BS=ids)
    assert not output[:, :3].any()
    torch.testing.assert_close(output[:, 3:], gated_conv(u[:, 3:], gate[:, 3:], weight))


def test_reaches_exactly_taps_minus_one_back() -> None:
    u, gate, weight, _ = (x.detach() for x in make_inputs(1, 20))
    before = gated_conv(u, gate, weight)

    def changes(token: int) -> bool:
        changed = u.clone()
        changed[:, token] += 1
        return not torch.equal(before[:, 10], gated_conv(changed, gate, weight)[:, 10])

    assert [changes(token) for token in (7, 8, 9, 10, 11)] == [False, True, True, True, False]


@pytest.mark.parametrize("documents", ["none", "random"])
def test_shards_with_halos_equal_the_whole(documents: str) -> None:
    lengths = [3, 1, 1, 20, 9]
    tokens = sum(lengths)
    u, gate, weight, _ = make_inputs(2, tokens)
    ids = document_ids(documents, 2, tokens)
    ids = torch.zeros(2, tokens, dtype=torch.int64) if ids is None else ids
    padded_u = torch.nn.functional.pad(u, (0, 0, 2, 0), value=9.0)
    padded_ids = torch.cat([torch.full((2, 2), -1), ids], dim=1)
    outputs, start = [], 0
    for length in lengths:
        end = start + length
        outputs.append(
            gated_conv(
                u[:, start:end],
                gate[:, start:end],
                weight,
                halo_BhD=padded_u[:, start : start + 2],
                key_document_ids_BS=padded_ids[:, start : end + 2],
            )
        )
        start = end
    whole = gated_conv(u, gate, weight, key_document_ids_BS=ids)
    assert_same_gradients((torch.cat(outputs, dim=1),), (whole,), (u, gate, weight), FP64_TOLERANCE)


def test_gradcheck() -> None:
    u, gate, weight, halo = make_inputs(2, 5, channels=2)
    ids = torch.tensor([[-1, 0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 5, 6]])

    def op(u, gate, weight, halo):
        return gated_conv(u, gate, weight, halo_BhD=halo, key_document_ids_BS=ids)

    assert torch.autograd.gradcheck(op, (u, gate, weight, halo))


def test_bf16_rounds_only_the_results() -> None:
    """Values and gradients are the fp64 ones within one rounding; the weight gradient sums 2000 tokens."""
    inputs = [x.detach().to(torch.bfloat16).requires_grad_() for x in make_inputs(2, 1000)[:3]]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    output, exact = gated_conv(*inputs), conv_oracle(*exact_inputs)
    cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    pairs = [(output, exact)]
    pairs += zip(
        torch.autograd.grad(output, inputs, cotangent),
        torch.autograd.grad(exact, exact_inputs, cotangent.double()),
        strict=True,
    )
    for got, expected in pairs:
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() / expected.norm() < 2.5e-3


def test_only_inputs_are_saved_for_backward() -> None:
    u, gate, weight, _ = make_inputs(1, 100)
    padded_u = u.numel() + 2 * u.shape[-1]
    assert saved_elements(lambda: gated_conv(u, gate, weight)) == padded_u + gate.numel() + weight.numel()
