"""RWKV-7, RWKV-4, Hyena and H3 as their papers write them, token by token, and the published sizes of their states."""

from typing import Any

import pytest
import torch
from baseline_cases import config_of
from recurrences import recurrence
from torch import Tensor
from torch.nn import functional

from based_megatron.baselines.h3 import H3
from based_megatron.baselines.hyena import Hyena
from based_megatron.baselines.operations.dplr import dplr_step
from based_megatron.baselines.rwkv4 import RWKV4
from based_megatron.baselines.rwkv7 import RWKV7
from based_megatron.config import ModelConfig
from based_megatron.model.build import build_model
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.sequence.plan import whole_sequence
from support.cases import each
from support.layouts import topology_of

TOKENS, D = 10, 32
META = torch.device("meta")


def rwkv7(x_TD: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    """4 heads of 8."""
    before = functional.pad(x_TD, (0, 0, 1, 0))[:-1]
    r, k, v, decay, rate, gate = (x_TD * (1 - mix) + before * mix for mix in p["token_mix"])
    r, k, v = (part @ p[f"{name}_proj.weight"].T for name, part in (("r", r), ("k", k), ("v", v)))
    decay = torch.tanh(decay @ p["decay.down.weight"].T) @ p["decay.up.weight"].T + p["decay.up.bias"]
    rate = torch.sigmoid(rate @ p["rate.down.weight"].T @ p["rate.up.weight"].T + p["rate.up.bias"])
    gate = torch.sigmoid(gate @ p["gate.down.weight"].T) @ p["gate.up.weight"].T
    kk = functional.normalize((k * p["k_k"]).unflatten(-1, (4, 8)), dim=-1)
    k = k * (1 + (rate - 1) * p["k_a"])
    w = -0.606530659712633 * decay.sigmoid()
    r, k, v, rate, w = (part.unflatten(-1, (4, 8)) for part in (r, k, v, rate, w))
    inputs = tuple(part[None] for part in (r, k, v, -kk, kk * rate, w))
    o = recurrence(dplr_step, inputs, torch.zeros(1, 4, 8, 8, dtype=x_TD.dtype))[0][0]
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, correction=0) + 8 * eps).sqrt()
    o = o.flatten(1) * p["norm.weight"] + p["norm.bias"]
    bonus = ((r * k * p["r_k"].unflatten(-1, (4, 8))).sum(-1, keepdim=True) * v).flatten(1)
    return ((o + bonus) * gate) @ p["out_proj.weight"].T


def rwkv4(x_TD: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    before = functional.pad(x_TD, (0, 0, 1, 0))[:-1]
    mixed = (x_TD * mix + before * (1 - mix) for mix in 1 - p["token_mix"])
    k, v, r = (part @ p[f"{name}_proj.weight"].T for name, part in zip("kvr", mixed, strict=True))
    w, outputs = p["decay"].exp(), []
    for t in range(TOKENS):
        weights = torch.stack([(k[j] - (t - 1 - j) * w).exp() for j in range(t)] + [(k[t] + p["bonus"]).exp()])
        outputs.append((weights * v[: t + 1]).sum(0) / weights.sum(0))
    return (r.sigmoid() * torch.stack(outputs)) @ p["out_proj.weight"].T


def hyena(x_TD: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    """Filters drawn by 12 units over 96 tokens."""
    projected = functional.pad(x_TD @ p["in_proj.weight"].T + p["in_proj.bias"], (0, 0, 2, 0))
    convolved = p["conv_bias"] + sum(p["conv_weight"][:, k] * projected[k : k + TOKENS] for k in range(3))
    x2, x1, v = convolved.split(D, dim=-1)
    n = torch.arange(TOKENS, dtype=x_TD.dtype)
    time, angle = n / 95, 2 * torch.pi * 1e-4 * n / 96
    hidden = torch.stack([time, angle.cos(), -angle.sin()], dim=-1)
    layers = [(p["filter.first"], p["filter.first_bias"])]
    layers += zip(p["filter.inner"], p["filter.inner_bias"], strict=True)
    for weight, bias in layers:
        hidden = torch.sin(p["filter.frequency"] * (hidden @ weight.T + bias))
    slowest, fastest = torch.tensor(0.01).double().log() / 1.5, torch.tensor(0.01).double().log() / 0.3
    slopes = slowest + (fastest - slowest) * torch.arange(D) / (D - 1)
    h = hidden @ p["filter.last"].T * (time[:, None] * slopes).exp()
    u = x1 * v
    y = torch.stack([sum(h[j] * u[t - j] for j in range(t + 1)) + p["skip"] * u[t] for t in range(TOKENS)])
    return (x2 * y) @ p["out_proj.weight"].T + p["out_proj.bias"]


def h3(x_TD: Tensor, p: dict[str, Tensor], eps: float) -> Tensor:
    """16 heads of 2 channels, states of 3 complex numbers, 6 taps."""
    q, k, v = (x_TD @ p["qkv.weight"].T).split(D, dim=-1)
    taps = p["taps"]
    k = torch.stack(
        [sum(taps[:, j] * k[t - j] for j in range(min(6, t + 1))) + p["key_skip"] * k[t] for t in range(TOKENS)]
    )
    q, k, v = (part.unflatten(-1, (16, 2)) for part in (q, k, v))
    a = torch.complex(-p["log_rate"].exp(), p["frequency"])
    factor = (a * p["log_step"].exp()[:, None]).exp()
    c = torch.view_as_complex(p["c_weight"].contiguous()) * (factor - 1) / a
    state, outputs = torch.zeros(16, 2, 2, 3, dtype=torch.complex128), []
    for t in range(TOKENS):
        product = k[t, :, :, None] * v[t, :, None]
        state = factor[:, None, None] * state + product[..., None]
        y = 2 * (c[:, None, None] * state).sum(-1).real + p["skip"][:, None, None] * product
        outputs.append((q[t, :, :, None] * y).sum(1).flatten())
    return torch.stack(outputs) @ p["out_proj.weight"].T


BY_HAND = {"rwkv7": rwkv7, "rwkv4": rwkv4, "hyena": hyena, "h3": h3}


def layer_error(name: str) -> float:
    """Largest difference, where every parameter has been moved from its initial value."""
    config, topology = config_of(name), topology_of()
    (chunk,) = build_model(config, topology, torch.float64)
    mixer: Any = chunk.layers["0"].mixer  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(2)
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    x_TD = torch.randn(TOKENS, D, dtype=torch.float64, generator=generator).to(topology.device)
    with torch.no_grad():
        found = mixer(x_TD[:, None], inputs=MixerInputs(whole_sequence(None, TOKENS, topology.device), None))[0][:, 0]
        expected = BY_HAND[name](x_TD, dict(mixer.named_parameters()), config.model.norm_eps)
    return float((found - expected).abs().max())


def test_layers_are_their_formulas(worker_pool):
    (errors,) = worker_pool(1).run(each, layer_error, list(BY_HAND))
    assert {name: error for name, error in errors.items() if not error < 1e-9} == {}


@pytest.mark.parametrize("width", [64, 128, 256])
def test_states_have_the_published_sizes(width):
    """64 d and the last token; 3 d and the last token. H3 counts d N, its state space keeps every key by every value of a head."""
    options = (f"h3.state_dim={width // 4}",)
    model = ModelConfig(hidden_size=width, num_heads=width // 64, mixer_options=options)
    of_rwkv7, of_rwkv4, of_h3 = (cls.empty_state(model, 1, torch.float32, META) for cls in (RWKV7, RWKV4, H3))
    assert (of_rwkv7.state_BHKV.numel(), of_rwkv7.last_BD.numel()) == (64 * width, width)
    assert (of_rwkv4.sums_BDX.numel(), of_rwkv4.exponent_BD.numel()) == (2 * width, width)
    assert of_rwkv4.last_BD.numel() == width
    assert (of_h3.moments_BHJVM2.numel(), of_h3.keys_BhD.numel()) == (2 * width * width // 4, (width // 4 - 1) * width)


def test_weights_and_flops():
    """4 d^2 each, and maps of low rank in RWKV-7."""
    model = ModelConfig(hidden_size=128, num_heads=2)
    assert RWKV7.linear_weights(model) == 4 * 128**2 + 2 * 128 * (64 + 64 + 160)
    assert {cls.linear_weights(model) for cls in (RWKV4, Hyena, H3)} == {4 * 128**2}
    assert RWKV7.mixing_flops(model, 256) == 9 * 64 * 128
    assert RWKV4.mixing_flops(model, 256) == 8 * 128
    assert Hyena.mixing_flops(model, 256) == (18 + 30 * 9) * 128
    assert H3.mixing_flops(model, 256) == 20 * 9 * 3 * 128 + 5 * 2 * 128


@pytest.mark.parametrize("cls", [RWKV7, RWKV4, Hyena, H3])
def test_initial_values_are_finite_and_vectors_do_not_decay(cls):
    model, generator = ModelConfig(hidden_size=64, num_heads=4), torch.Generator().manual_seed(1)
    for name, shape in cls.parameter_shapes(model).items():
        values = cls.initial(name, shape, model, generator)
        assert values.shape == shape and values.isfinite().all(), name
        assert len(shape) > 1 or not cls.decays(name), name


def test_rwkv7_decays_from_slow_to_fast_at_first():
    """Log decays of -0.6 sigmoid(bias): channels of each head begin slow, and later heads are faster."""
    model = ModelConfig(hidden_size=128, num_heads=2)
    bias = RWKV7.initial("decay.up.bias", (128,), model, torch.Generator())
    assert bias[:64].mean() < bias[64:].mean()
    assert float(bias[0]) == pytest.approx(-8.0) and float(bias[-1]) == pytest.approx(3.0)
