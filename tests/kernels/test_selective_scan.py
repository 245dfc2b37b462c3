"""The selective scan against a loop over tokens in fp64, outputs and gradients; the kernels themselves compute in fp32."""

import pytest
import torch
from kernel_oracles import DEVICE, assert_same_gradients, document_ids
from torch import Tensor

from based_megatron.kernels.selective_scan import reference, selective_scan

TOLERANCE = {"reference": 1e-12, "triton": 1e-5}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def make_inputs(batch: int, tokens: int, channels: int, states: int) -> tuple[Tensor, ...]:
    """x, steps, rates, b, c and an initial state, fp64."""
    torch.manual_seed(0)
    x, initial = torch.randn(batch, tokens, channels), torch.randn(batch, channels, states)
    b, c = torch.randn(2, batch, tokens, states).unbind()
    step, rate = torch.rand(batch, tokens, channels), -torch.rand(channels, states) - 0.1
    return tuple(part.double().requires_grad_() for part in (x, step, rate, b, c, initial))


def oracle(
    x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, state: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, straight from its definition."""
    h = torch.zeros(x.shape[0], *rate.shape, dtype=x.dtype) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        if ids is not None and t:
            h = torch.where((ids[:, t] == ids[:, t - 1])[:, None, None], h, 0.0)
        h = torch.exp(step[:, t, :, None] * rate) * h + step[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), h


def scan(backend: str, *inputs: Tensor, state: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op of fp64 tensors on the CPU: in fp64 in the reference, in fp32 on the kernels' device in Triton."""
    dtype, device = (torch.float64, "cpu") if backend == "reference" else (torch.float32, DEVICE)
    outputs = selective_scan(
        *(part.to(device, dtype) for part in inputs),  # type: ignore[arg-type]
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
    expected = oracle(*inputs, initial, ids)
    found = scan(backend, *inputs, state=initial, ids=ids)
    wanted = (*inputs, state) if has_state else tuple(inputs)
    assert_same_gradients(found, expected, wanted, TOLERANCE[backend])


def test_gradients_are_those_of_the_function(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 2)
    *inputs, state = make_inputs(1, 5, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x[:5], initial_state_BCN=x[5]), (*inputs, state))


@BACKENDS
def test_views_and_bf16_are_taken_as_they_are(backend):
    """x and the steps lie tokens first, b and c are parts of one projection; y is bf16, the state is not."""
    x, step, rate, b, c, _ = (part.detach().float().to(DEVICE) for part in make_inputs(2, 9, 5, 3))
    x, step = (part.bfloat16().transpose(0, 1).contiguous().transpose(0, 1) for part in (x, step))
    b, c = torch.cat([b, c], dim=-1).bfloat16().split([3, 3], dim=-1)
    y, state = selective_scan(x, step, rate, b, c, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, last = oracle(*(part.double().cpu() for part in (x, step, rate, b, c)), None, None)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state.cpu().double(), last, rtol=1e-4, atol=1e-4)


def test_the_reference_keeps_few_states():
    """One state a chunk of 64 tokens, not one a token."""
    *inputs, _ = make_inputs(1, 640, 4, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_scan(*inputs)
    assert sum(saved) < 640 * 4 * 8
