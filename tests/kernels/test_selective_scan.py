"""The selective scan against a loop over tokens in fp64, outputs and gradients; the kernels themselves compute in fp32."""

import pytest
import torch
from kernel_oracles import DEVICE, assert_same_gradients, document_ids
from torch import Tensor

from based_megatron.kernels.selective_scan import reference, selective_scan

TOLERANCE = {"reference": 1e-12, "triton": 1e-5}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def make_inputs(batch: int, tokens: int, channels: int, states: int) -> tuple[Tensor, ...]:
    """x, raw steps, rates, b, c, gates, bias of the steps, skips and an initial state, fp64."""
    torch.manual_seed(0)
    x, raw, gate = torch.randn(3, batch, tokens, channels).unbind()
    b, c = torch.randn(2, batch, tokens, states).unbind()
    rate, initial = -torch.rand(channels, states) - 0.1, torch.randn(batch, channels, states)
    bias, skip = torch.randn(2, channels).unbind()
    inputs = (x, raw, rate, b, c, gate, bias, skip, initial)
    return tuple(part.double().requires_grad_() for part in inputs)


def oracle(*inputs: Tensor, state: Tensor | None = None, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence, straight from its definition."""
    x, raw, rate, b, c, gate, bias, skip = inputs
    h = torch.zeros(x.shape[0], *rate.shape, dtype=x.dtype) if state is None else state
    step, outputs = torch.log(1 + torch.exp(raw + bias)), []
    for t in range(x.shape[1]):
        if ids is not None and t:
            h = torch.where((ids[:, t] == ids[:, t - 1])[:, None, None], h, 0.0)
        h = torch.exp(step[:, t, :, None] * rate) * h + step[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        outputs.append((h * c[:, t, None]).sum(-1) + skip * x[:, t])
    return torch.stack(outputs, dim=1) * gate / (1 + torch.exp(-gate)), h


def scan(
    backend: str, *inputs: Tensor, state: Tensor | None = None, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The op of fp64 tensors on the CPU: in fp64 in the reference, in fp32 on the kernels' device in Triton."""
    dtype, device = (torch.float64, "cpu") if backend == "reference" else (torch.float32, DEVICE)
    *tokens, bias, skip = (part.to(device, dtype) for part in inputs)
    outputs = selective_scan(
        *tokens,
        step_bias_C=bias,
        skip_C=skip,
        initial_state_BCN=None if state is None else state.to(device, dtype),
        document_ids_BT=None if ids is None else ids.to(device),
        backend=backend,
    )
    assert all(output.dtype == dtype for output in outputs)
    return outputs[0].to("cpu", torch.float64), outputs[1].to("cpu", torch.float64)


@BACKENDS
@pytest.mark.parametrize("documents", ["none", "random", "single_tokens"])
@pytest.mark.parametrize(("tokens", "channels", "states"), [(1, 3, 4), (7, 33, 5), (65, 3, 1)])
@pytest.mark.parametrize("has_state", [False, True])
def test_equals_the_loop(backend, documents, tokens, channels, states, has_state):
    """Channels, states and tokens on both sides of the end of a tile or of a chunk."""
    *inputs, state = make_inputs(2, tokens, channels, states)
    ids = document_ids(documents, 2, tokens)
    initial = state if has_state else None
    expected = oracle(*inputs, state=initial, ids=ids)
    found = scan(backend, *inputs, state=initial, ids=ids)
    wanted = (*inputs, state) if has_state else tuple(inputs)
    assert_same_gradients(found, expected, wanted, TOLERANCE[backend])


def test_gradients_are_those_of_the_function(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 2)
    assert torch.autograd.gradcheck(lambda *x: scan("reference", *x[:-1], state=x[-1]), make_inputs(1, 5, 2, 2))


@BACKENDS
def test_views_and_bf16_are_taken_as_they_are(backend):
    """x, the steps and the gate lie tokens first, b and c are parts of one projection; y is bf16, the state is not."""
    x, raw, rate, b, c, gate, bias, skip, _ = (part.detach().float().to(DEVICE) for part in make_inputs(2, 9, 5, 3))
    x, raw, gate = (part.bfloat16().transpose(0, 1).contiguous().transpose(0, 1) for part in (x, raw, gate))
    b, c = torch.cat([b, c], dim=-1).bfloat16().split([3, 3], dim=-1)
    y, state = selective_scan(x, raw, rate, b, c, gate, step_bias_C=bias, skip_C=skip, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, last = oracle(*(part.double().cpu() for part in (x, raw, rate, b, c, gate, bias, skip)))
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state.cpu().double(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [-12.0, 12.0])
def test_small_and_large_steps_are_exact(bias):
    """Steps of e^-12, of which log(1 + e^v) in fp32 has two digits, and of 12."""
    *inputs, _ = make_inputs(1, 3, 2, 2)
    inputs[6] = torch.full_like(inputs[6], bias)
    found, expected = scan("triton", *inputs), oracle(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_the_reference_keeps_few_states():
    """One state a chunk of 64 tokens, not one a token."""
    *inputs, _ = make_inputs(1, 640, 8, 32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        scan("reference", *inputs)
    assert sum(saved) < 640 * 8 * 32
