"""The gated convolution against a loop over tokens and taps, in fp64; the kernels themselves compute in fp32."""

import pytest
import torch
from kernel_oracles import assert_same_gradients, conv_oracle, document_ids, saved_elements
from torch import Tensor

from based_megatron.kernels.gated_conv import gated_conv, gated_conv_fused, silu_conv

FP64_TOLERANCE = 1e-12
TOLERANCE = {"reference": FP64_TOLERANCE, "triton": 1e-5}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_inputs(batch: int, tokens: int, taps: int = 3, channels: int = 5):
    torch.manual_seed(0)
    u, gate = (torch.randn(batch, tokens, channels, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(channels, taps, dtype=torch.float64, requires_grad=True)
    halo = torch.randn(batch, taps - 1, channels, dtype=torch.float64, requires_grad=True)
    return u, gate, weight, halo


def conv(
    backend: str, u: Tensor, gate: Tensor, weight: Tensor, halo: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """The op of fp64 tensors on the CPU: in fp64 in the reference, in fp32 on the kernels' device in Triton."""
    dtype, device = (torch.float64, "cpu") if backend == "reference" else (torch.float32, DEVICE)
    u, gate, weight = (x.to(device, dtype) for x in (u, gate, weight))
    halo = None if halo is None else halo.to(device, dtype)
    ids = None if ids is None else ids.to(device)
    y = gated_conv(u, gate, weight, halo_BhD=halo, key_document_ids_BS=ids, backend=backend)
    assert y.dtype == dtype
    return y.to("cpu", torch.float64)


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 65])
def test_equals_the_loop(tokens: int, taps: int, documents: str, backend: str) -> None:
    u, gate, weight, _ = make_inputs(2, tokens, taps)
    ids = document_ids(documents, 2, tokens)
    output = conv(backend, u, gate, weight, None, ids)
    expected = conv_oracle(u, gate, weight, None, ids)
    assert_same_gradients((output,), (expected,), (u, gate, weight), TOLERANCE[backend])


@pytest.mark.parametrize(("tokens", "taps", "channels"), [(63, 3, 7), (64, 3, 300), (129, 2, 5), (129, 4, 3)])
def test_tile_edges_of_the_kernels(tokens: int, taps: int, channels: int) -> None:
    """Tokens and channels on both sides of a tile's end, with a halo and documents across it."""
    u, gate, weight, halo = make_inputs(1, tokens, taps, channels)
    ids = document_ids("random", 1, taps - 1 + tokens)
    output = conv("triton", u, gate, weight, halo, ids)
    expected = conv_oracle(u, gate, weight, halo, ids)
    assert_same_gradients((output,), (expected,), (u, gate, weight, halo), TOLERANCE["triton"])


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_halo_values_and_gradients(tokens: int, documents: str, backend: str) -> None:
    u, gate, weight, halo = make_inputs(2, tokens)
    ids = document_ids(documents, 2, 2 + tokens)
    output = conv(backend, u, gate, weight, halo, ids)
    expected = conv_oracle(u, gate, weight, halo, ids)
    assert_same_gradients((output,), (expected,), (u, gate, weight, halo), TOLERANCE[backend])


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("has_halo", [False, True])
@pytest.mark.parametrize("tokens", [1, 70])
def test_with_a_bias_and_without_a_gate(tokens: int, has_halo: bool, documents: str, backend: str) -> None:
    u, _, weight, halo = make_inputs(2, tokens, taps=4)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rows = 3 + tokens if has_halo else tokens
    initial, ids = halo if has_halo else None, document_ids(documents, 2, rows)
    dtype, device = (torch.float64, "cpu") if backend == "reference" else (torch.float32, DEVICE)
    output = silu_conv(
        u.to(device, dtype),
        weight.to(device, dtype),
        bias.to(device, dtype),
        halo_BhD=initial if initial is None else initial.to(device, dtype),
        key_document_ids_BS=ids if ids is None else ids.to(device),
        backend=backend,
    )
    assert output.dtype == dtype
    expected = conv_oracle(u, 1.0, weight, initial, ids, bias)
    wanted = (u, weight, bias, halo) if has_halo else (u, weight, bias)
    assert_same_gradients((output.to("cpu", torch.float64),), (expected,), wanted, TOLERANCE[backend])


@BACKENDS
def test_halves_of_a_projection_give_the_same_and_keep_its_layout(backend: str) -> None:
    """[u | gate] with the tokens outermost, as the model's projection leaves it: same values and gradients, same layout."""
    torch.manual_seed(0)
    projected = torch.randn(70, 2, 12, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, 3, device=DEVICE, requires_grad=True)
    halo = torch.randn(2, 2, 6, device=DEVICE, requires_grad=True)
    output = gated_conv_fused(projected.transpose(0, 1), weight, halo_BhD=halo, backend=backend)
    u, gate, exact_weight, exact_halo = (
        x.detach().double().cpu().requires_grad_() for x in (*projected.transpose(0, 1).chunk(2, dim=-1), weight, halo)
    )
    dy = torch.randn(2, 70, 6)
    dprojected, dweight, dhalo = torch.autograd.grad(output, (projected, weight, halo), dy.to(DEVICE))
    exact = conv_oracle(u, gate, exact_weight, exact_halo)
    du, dgate, *exact_grads = torch.autograd.grad(exact, (u, gate, exact_weight, exact_halo), dy.double())
    expected = [exact, torch.cat([du, dgate], dim=-1).transpose(0, 1), *exact_grads]
    for got, want in zip([output, dprojected, dweight, dhalo], expected, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-4)
    if backend == "triton":
        assert output.transpose(0, 1).is_contiguous() and dprojected.is_contiguous()


@BACKENDS
def test_inputs_that_do_not_exist_count_as_zero(backend: str) -> None:
    u, gate, weight, halo = make_inputs(1, 4)
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0]])
    output = conv(backend, u, gate, weight, halo, ids)
    torch.testing.assert_close(output, conv(backend, u, gate, weight))
    (halo_grad,) = torch.autograd.grad(output.sum(), halo)
    assert not halo_grad.any()


@BACKENDS
def test_padding_outputs_are_zero(backend: str) -> None:
    u, gate, weight, _ = make_inputs(1, 6)
    ids = torch.tensor([[-1, -1, -1, 0, 0, 0]])
    output = conv(backend, u, gate, weight, None, ids)
    assert not output[:, :3].any()
    torch.testing.assert_close(output[:, 3:], conv(backend, u[:, 3:], gate[:, 3:], weight))
    expected = conv_oracle(u, gate, weight, None, ids)
    assert_same_gradients((output,), (expected,), (u, gate, weight), TOLERANCE[backend])


@BACKENDS
def test_one_row_of_document_ids_serves_the_whole_batch(backend: str) -> None:
    u, gate, weight, _ = make_inputs(3, 20)
    ids = document_ids("random", 1, 20)
    assert ids is not None
    shared, repeated = conv(backend, u, gate, weight, None, ids), conv(backend, u, gate, weight, None, ids.repeat(3, 1))
    assert torch.equal(shared, repeated)


@BACKENDS
def test_reaches_exactly_taps_minus_one_back(backend: str) -> None:
    u, gate, weight, _ = (x.detach() for x in make_inputs(1, 20))
    before = conv(backend, u, gate, weight)

    def changes(token: int) -> bool:
        changed = u.clone()
        changed[:, token] += 1
        return not torch.equal(before[:, 10], conv(backend, changed, gate, weight)[:, 10])

    assert [changes(token) for token in (7, 8, 9, 10, 11)] == [False, True, True, True, False]


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random"])
def test_shards_with_halos_equal_the_whole(documents: str, backend: str) -> None:
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
        halo, shard_ids = padded_u[:, start : start + 2], padded_ids[:, start : end + 2]
        outputs.append(conv(backend, u[:, start:end], gate[:, start:end], weight, halo, shard_ids))
        start = end
    whole = conv(backend, u, gate, weight, None, ids)
    assert_same_gradients((torch.cat(outputs, dim=1),), (whole,), (u, gate, weight), TOLERANCE[backend])


def test_gradients_are_finite_differences() -> None:
    u, gate, weight, halo = make_inputs(2, 5, channels=2)
    ids = torch.tensor([[-1, 0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 5, 6]])

    def op(u, gate, weight, halo):
        return gated_conv(u, gate, weight, halo_BhD=halo, key_document_ids_BS=ids)

    assert torch.autograd.gradcheck(op, (u, gate, weight, halo))


@pytest.mark.parametrize(("backend", "tokens"), [("reference", 1000), ("triton", 130)])
def test_bf16_rounds_only_the_results(backend: str, tokens: int) -> None:
    """Values and gradients are the fp64 ones within one rounding; the weight gradient sums all tokens."""
    device = torch.device("cpu") if backend == "reference" else DEVICE
    inputs = [x.detach().to(device, torch.bfloat16).requires_grad_() for x in make_inputs(2, tokens)[:3]]
    exact_inputs = [x.detach().double().cpu().requires_grad_() for x in inputs]
    output, exact = gated_conv(*inputs, backend=backend), conv_oracle(*exact_inputs)
    cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    pairs = [(output, exact)]
    pairs += zip(
        torch.autograd.grad(output, inputs, cotangent.to(device)),
        torch.autograd.grad(exact, exact_inputs, cotangent.double()),
        strict=True,
    )
    for got, expected in pairs:
        assert got.dtype == torch.bfloat16
        assert (got.double().cpu() - expected).norm() / expected.norm() < 2.5e-3


def test_the_kernels_give_the_same_bits_in_every_run() -> None:
    inputs = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in make_inputs(2, 130)[:3]]

    def run() -> list[Tensor]:
        y = gated_conv(*inputs, backend="triton")
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_only_inputs_are_saved_for_backward() -> None:
    u, gate, weight, _ = make_inputs(1, 100)
    padded_u = u.numel() + 2 * u.shape[-1]
    assert saved_elements(lambda: gated_conv(u, gate, weight)) == padded_u + gate.numel() + weight.numel()
    single = [x.to(DEVICE, torch.float32) for x in (u, gate, weight)]
    assert saved_elements(lambda: gated_conv(*single, backend="triton")) == sum(x.numel() for x in single)
