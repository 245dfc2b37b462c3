"""DeltaNet and Gated DeltaNet: sizes as published, the layer of another implementation, and refusals."""

import dataclasses
from typing import Any

import pytest
import torch
from baseline_cases import config_of
from recurrences import recurrence
from torch.nn import functional

from based_megatron.baselines.deltanet import DeltaNet, GatedDeltaNet
from based_megatron.baselines.operations.delta import delta_step
from based_megatron.config import Config, ModelConfig
from based_megatron.errors import ConfigError
from based_megatron.model.build import build_model
from based_megatron.model.check import check_mixers
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.sequence.plan import whole_sequence
from support.layouts import topology_of

STUDY = ("gated_deltanet.expand_k=1", "gated_deltanet.expand_v=2", "gated_deltanet.gate=false")


@pytest.mark.parametrize("width", [64, 128, 256])
def test_states_have_the_published_sizes(width):
    """With 2 heads d^2 / 2 elements, d^2 where values are twice as wide; and 3 inputs of each channel of the convolution."""
    meta, model = torch.device("meta"), ModelConfig(hidden_size=width, num_heads=2, mixer_options=STUDY)
    plain, gated = (cls.empty_state(model, 1, torch.float32, meta) for cls in (DeltaNet, GatedDeltaNet))
    assert (plain.state_BHKV.numel(), plain.inputs_BhC.numel()) == (width**2 // 2, 9 * width)
    assert (gated.state_BHKV.numel(), gated.inputs_BhC.numel()) == (width**2, 12 * width)


def test_weights_and_flops():
    """4 d^2 weights and d for each head's beta; 6 d^2 with a gate and keys and values of 3/4 and 3/2 d."""
    model = ModelConfig(hidden_size=64, num_heads=4)
    assert DeltaNet.linear_weights(model) == 4 * 64**2 + 64 * 4
    assert GatedDeltaNet.linear_weights(model) == 6 * 64**2 + 64 * 8
    assert DeltaNet.mixing_flops(model, 128) == 6 * 64 * 64 / 4 + 2 * 4 * 192
    assert GatedDeltaNet.mixing_flops(model, 128) == 7 * 48 * 96 / 4 + 2 * 4 * 192


def formula_error(name: str) -> float:
    """Largest difference from the layer written token by token."""
    config, topology = config_of(name), topology_of()
    (chunk,) = build_model(config, topology, torch.float64)
    mixer: Any = chunk.layers["0"].mixer  # type: ignore[union-attr]
    weights, tokens = dict(mixer.named_parameters()), 10
    x = torch.randn(tokens, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(topology.device)
    key, value, extra = (32, 32, [4]) if name == "deltanet" else (24, 48, [48, 4, 4])
    projected = x @ weights["in_proj.weight"].T
    qkv, *rest = projected.split([2 * key + value, *extra], dim=-1)
    padded = functional.pad(qkv, (0, 0, 3, 0))
    taps = weights["conv_weight"]
    qkv = functional.silu(sum(taps[:, tap] * padded[tap : tap + tokens] for tap in range(4)))
    q, k, v = (part.unflatten(-1, (4, -1)) for part in qkv.split([key, key, value], dim=-1))
    q, k = (part / (part.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    g, gate = torch.zeros(tokens, 4, dtype=torch.float64), torch.ones(())
    if name == "gated_deltanet":
        gate, beta, steps = functional.silu(rest[0]).unflatten(-1, (4, -1)), rest[1], rest[2]
        g = -weights["log_rate"].exp() * functional.softplus(steps + weights["step_bias"])
    else:
        beta = rest[0]
    state = torch.zeros(1, 4, key // 4, value // 4, dtype=torch.float64)
    inputs = tuple(part[None] for part in (q, k, v, beta.sigmoid(), g))
    o = recurrence(delta_step, inputs, state, scale=(key // 4) ** -0.5)[0][0]
    o = o / (o.pow(2).mean(-1, keepdim=True) + config.model.norm_eps).sqrt() * weights["norm.weight"] * gate
    expected = o.flatten(1) @ weights["out_proj.weight"].T
    with torch.no_grad():
        plan = whole_sequence(None, tokens, topology.device)
        return float((mixer(x[:, None], inputs=MixerInputs(plan, None))[0][:, 0] - expected).abs().max())


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_a_layer_is_its_formula(worker_pool, name):
    """This fixes the order of the fused parts: q, k, v, gate, beta, steps."""
    (error,) = worker_pool(1).run(formula_error, name)
    assert error < 1e-12


@pytest.mark.parametrize("word", ["deltanet.expand_k=0.3", "deltanet.expand_v=0.03125"])
def test_widths_that_heads_cannot_share_are_refused(word):
    config = config_of("deltanet")
    model = dataclasses.replace(config.model, mixer_options=(word,))
    with pytest.raises(ConfigError, match=r"deltanet cannot have 4 heads in a width of .*mixer_options") as error:
        check_mixers(Config(model=model))
    assert "\n" not in str(error.value)
