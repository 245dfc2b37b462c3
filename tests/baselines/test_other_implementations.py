"""The baselines against implementations of others: fla-core's plain functions and its kernels, and transformers' Mamba layers."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from baseline_cases import config_of
from recurrences import gradients, some_ids
from torch import Tensor

from based_megatron.baselines import fla
from based_megatron.baselines.operations.scalar_decay import scalar_decay
from based_megatron.baselines.operations.vector_decay import vector_decay
from based_megatron.model.build import build_model
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.sequence.plan import whole_sequence
from support.layouts import topology_of

NEEDS_FLA = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed")


def some_inputs(tokens: int, key_decays: bool, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v and log decays of 3 sequences with 2 heads of 32."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 3, tokens, 2, 32, generator=generator).unbind()
    g = -torch.rand(3, tokens, 2, *([32] if key_decays else []), generator=generator) / 8
    return tuple(x.to(device, dtype).requires_grad_() for x in (q, k, v, g))


@NEEDS_FLA
@pytest.mark.slow  # importing fla takes 15 seconds
def test_the_plain_functions_of_fla_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.gla.naive import naive_recurrent_gla
        from fla.ops.retention.naive import naive_retention
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
    q, k, v, g = some_inputs(70, False, torch.float32)
    expected, _ = naive_recurrent_simple_gla(q, k, v, g, scale=0.3)
    torch.testing.assert_close(scalar_decay(q, k, v, g, scale=0.3)[0], expected, rtol=1e-5, atol=1e-5)
    decays = torch.log1p(-torch.exp2(-5.0 - torch.arange(2))).expand(3, 70, 2)
    expected = naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    found, _ = scalar_decay(q, k, v, decays, scale=32**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    q, k, v, g = some_inputs(70, True, torch.float32)
    expected, _ = naive_recurrent_gla(q, k, v, g)
    torch.testing.assert_close(vector_decay(q, k, v, g, scale=32**-0.5)[0], expected, rtol=1e-5, atol=1e-5)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@NEEDS_FLA
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "key_decays"), [("scalar_decay", False), ("vector_decay", True)])
@pytest.mark.parametrize(
    ("dtype", "of_outputs", "of_gradients"), [(torch.float32, 1e-3, 1e-3), (torch.bfloat16, 1e-2, 2e-2)]
)
def test_the_kernels_of_fla_agree(name, key_decays, packed, dtype, of_outputs, of_gradients):
    """fp32 matrix products of its kernels are in TF32."""
    inputs = some_inputs(200, key_decays, dtype, "cuda")
    ids = some_ids(3, 200).to("cuda") if packed else None
    assert fla.serves(inputs[0], "triton") and not fla.serves(inputs[0], "reference")
    found, _ = getattr(fla, name)(*inputs[:3], inputs[3].float(), scale=0.3, document_ids_BT=ids)
    plain = {"scalar_decay": scalar_decay, "vector_decay": vector_decay}[name]
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected, _ = plain(*exact, scale=0.3, document_ids_BT=ids)  # type: ignore[operator]
    assert found.dtype == dtype and relative(found, expected) < of_outputs
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to("cuda")
    of_found = torch.autograd.grad((found.double() * cotangent).sum(), inputs)
    of_exact = torch.autograd.grad((expected * cotangent).sum(), exact)
    assert max(relative(x, y) for x, y in zip(of_found, of_exact, strict=True)) < of_gradients


def their_layer(name: str) -> Any:
    """transformers' layer in the sizes of the small model."""
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    if name == "mamba":
        return MambaMixer(MambaConfig(hidden_size=32, state_size=5, conv_kernel=4, time_step_rank=2), layer_idx=0)
    sizes = dict(hidden_size=32, num_heads=8, head_dim=8, state_size=5, n_groups=1, conv_kernel=4)
    return Mamba2Mixer(Mamba2Config(**sizes, chunk_size=16, layer_norm_epsilon=1e-5), layer_idx=0)


def their_weights(name: str, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' layer."""
    common = {"out_proj.weight": ours["out_proj.weight"], "A_log": ours["log_rate"], "D": ours["skip"]}
    if name == "mamba":
        return {
            **common,
            "in_proj.weight": ours["in_proj.weight"],
            "conv1d.weight": ours["taps"][:, None],
            "conv1d.bias": ours["taps_bias"],
            "x_proj.weight": ours["x_proj.weight"],
            "dt_proj.weight": ours["step_proj.weight"],
            "dt_proj.bias": ours["step_bias"],
        }
    z, x, steps = ours["zxdt.weight"].split([64, 64, 8])
    return {
        **common,
        "in_proj.weight": torch.cat([z, x, ours["bc.weight"], steps]),
        "conv1d.weight": torch.cat([ours["x_taps"], ours["bc_taps"]])[:, None],
        "conv1d.bias": torch.cat([ours["x_bias"], ours["bc_bias"]]),
        "dt_bias": ours["step_bias"],
        "norm.weight": ours["norm_weight"],
    }


def errors_beside_transformers(name: str) -> tuple[float, float]:
    """Relative errors of outputs and of the input's gradient, in fp32, with all weights drawn at random."""
    config, topology = config_of(name), topology_of()
    (chunk,) = build_model(config, topology, torch.float32)
    mixer: Any = chunk.layers["0"].mixer  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = their_layer(name)
    theirs.load_state_dict(their_weights(name, dict(mixer.named_parameters())))
    x = torch.randn(2, 50, 32, generator=generator).to(topology.device).requires_grad_()
    found = mixer(x.transpose(0, 1), inputs=MixerInputs(whole_sequence(None, 50, topology.device), None))[0]
    expected = theirs(x)
    of_found, of_expected = (gradients((y,), (x,))[0] for y in (found.transpose(0, 1), expected))
    return relative(found.transpose(0, 1), expected), relative(of_found, of_expected)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_layers_of_transformers_agree(worker_pool, name):
    ((of_outputs, of_gradients),) = worker_pool(1).run(errors_beside_transformers, name)
    assert of_outputs < 1e-5 and of_gradients < 1e-5
