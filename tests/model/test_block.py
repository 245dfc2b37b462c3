"""A layer: the order of the MLP's halves, the fp32 residual, and what is recomputed."""

import torch
from small_models import here, shared_config, whole_plan
from torch import Tensor
from torch.nn import functional

from based_megatron.model.block import Block
from based_megatron.model.mixers import MIXERS, MixerInputs
from based_megatron.model.mlp import SwiGLU
from support.cases import each
from support.layouts import topology_of


def add(residual: Tensor, update: Tensor) -> Tensor:
    return residual + update


def swiglu_error() -> tuple[float, float]:
    """(error of fc2(value * silu(gate)), difference to the other order)."""
    topology = topology_of()
    mlp = SwiGLU(shared_config(torch.float64), topology.tensor.group)
    for parameter in mlp.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    mlp, x = here(mlp), here(torch.randn(5, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    value, gate = (functional.linear(x, half) for half in mlp.fc1.weight.split([48, 48]))
    right = functional.linear(value * (gate * torch.sigmoid(gate)), mlp.fc2.weight)
    swapped = functional.linear(gate * (value * torch.sigmoid(value)), mlp.fc2.weight)
    found = mlp(x)
    return float((found - right).abs().max()), float((found - swapped).abs().max())


def test_the_second_half_is_the_gate(worker_pool):
    """The released order of the halves; Llama's and Megatron's is the other."""
    error, other = worker_pool(1).run(swiglu_error)[0]
    assert error < 1e-10 and other > 1


def block_of(letter: str, dtype: torch.dtype, recompute: str = "none") -> tuple[Block, MixerInputs]:
    topology = topology_of()
    block = Block(shared_config(dtype, recompute), MIXERS[letter], 1, topology.process_groups)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return here(block), MixerInputs(whole_plan(topology), None)


def residual_of_a_bf16_block() -> tuple[torch.dtype, bool, Tensor, Tensor]:
    """(dtype out, whether a block of zero outputs changes nothing, mixer's input dtype, out - in - parts)."""
    block, inputs = block_of("c", torch.bfloat16)
    residual = here(1 + torch.arange(24 * 32, dtype=torch.float32).reshape(24, 1, 32) * 2**-20)
    output = add(*block(residual, None, inputs))
    mixed = block.mixer(block.mixer_norm(residual)[1], inputs=inputs)[0]
    middle = residual + mixed
    expected = middle + block.mlp(block.mlp_norm(middle)[1])
    for layer in (block.mixer.out_proj, block.mlp.fc2):
        for parameter in layer.parameters():
            parameter.data.zero_()
    return (
        output.dtype,
        bool(torch.equal(add(*block(residual, None, inputs)), residual)),
        output.detach().cpu(),
        expected.detach().cpu(),
    )


def test_the_residual_stays_in_fp32(worker_pool):
    """bf16 would lose steps of 2^-20 next to 1."""
    dtype, kept, found, expected = worker_pool(1).run(residual_of_a_bf16_block)[0]
    assert dtype == torch.float32 and kept
    assert torch.equal(found, expected)


def calls_of(recompute: str, gradients: bool) -> tuple[int, int]:
    """Number of times that (mixer, MLP) run in a forward and backward."""
    block, inputs = block_of("c", torch.float64, recompute)
    calls = {"mixer": 0, "mlp": 0}
    for name in calls:
        module = getattr(block, name)
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    with torch.set_grad_enabled(gradients):
        output = add(*block(here(torch.randn(24, 1, 32, dtype=torch.float64)).requires_grad_(), None, inputs))
    if gradients:
        output.sum().backward()
    return calls["mixer"], calls["mlp"]


CALLS = {("none", True): (1, 1), ("mixer", True): (2, 1), ("full", True): (2, 2), ("full", False): (1, 1)}


def test_what_is_asked_for_is_recomputed(worker_pool):
    """Without gradients nothing is recomputed."""
    assert worker_pool(1).run(each, calls_of, list(CALLS)) == [CALLS]


def errors_of_a_pending_update(recompute: str) -> list[float]:
    """Differences between a block that adds an update first, and one that gets the sum: outputs and gradients."""
    block, inputs = block_of("c", torch.float64, recompute)
    residual, update = (here(torch.randn(24, 1, 32, dtype=torch.float64)).requires_grad_() for _ in range(2))
    output = add(*block(residual, update, inputs))
    output.square().sum().backward()
    whole = (residual + update).detach().requires_grad_()
    expected = add(*block(whole, None, inputs))
    expected.square().sum().backward()
    pairs = [(output, expected), (residual.grad, whole.grad), (update.grad, whole.grad)]
    return [float((found - wanted).abs().max()) for found, wanted in pairs]


def test_what_the_layer_before_adds_comes_first(worker_pool):
    found = worker_pool(1).run(each, errors_of_a_pending_update, ["none", "mixer", "full"])[0]
    assert all(error < 1e-12 for errors in found.values() for error in errors)
