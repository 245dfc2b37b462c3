"""RetNet as its paper has it: sizes, decays of its heads, and the form with all pairs of tokens."""

from typing import Any

import torch
from baseline_cases import config_of
from torch.nn import functional

from based_megatron.baselines.retnet import RetNet
from based_megatron.config import ModelConfig
from based_megatron.model.build import build_model
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.sequence.plan import whole_sequence
from support.layouts import topology_of

MODULE = "based_megatron.baselines.retnet"


def test_the_state_of_a_layer_has_the_published_size():
    """d^2 / 2 elements with 2 heads and values of width d; KV / H in general."""
    model = ModelConfig(hidden_size=64, num_heads=2, mixer_options=("retnet.expand_v=1",))
    assert RetNet.state_bytes(model, torch.bfloat16) == 4 * 64**2 // 2
    assert RetNet.state_bytes(ModelConfig(hidden_size=1024, num_heads=8), torch.bfloat16) == 4 * 1024 * 2048 // 8


def test_weights_and_flops():
    model = ModelConfig(hidden_size=64, num_heads=4)
    assert RetNet.linear_weights(model) == 8 * 64**2
    assert RetNet.mixing_flops(model, 128) == 4 * 64 * 128 / 4


def parallel_error() -> float:
    """Largest difference from the paper's form with all pairs."""
    config, topology = config_of("retnet"), topology_of()
    (chunk,) = build_model(config, topology, torch.float64)
    mixer: Any = chunk.layers["0"].mixer  # type: ignore[union-attr]
    tokens, heads, head_dim = 10, 4, 8
    x_TD = torch.randn(tokens, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x_TD = x_TD.to(topology.device)
    angles = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    inputs = MixerInputs(whole_sequence(None, tokens, topology.device), (angles.cos(), angles.sin()))
    weights = dict(mixer.named_parameters())
    q, k, v, gate = (x_TD @ weights["qkvg.weight"].T).split([32, 32, 64, 64], dim=-1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.view(tokens, heads, 2, 4).transpose(-1, -2).contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mixed = []
    for h in range(heads):
        decay = torch.where(distance >= 0, (1 - 2.0 ** (-5 - h)) ** distance.double(), 0.0)
        scores = turned(q)[:, h] @ turned(k)[:, h].T / head_dim**0.5
        o = (scores * decay) @ v.view(tokens, heads, 16)[:, h]
        mixed.append(o / (o.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * weights["norm.weight"])
    expected = (torch.cat(mixed, dim=-1) * functional.silu(gate)) @ weights["out_proj.weight"].T
    with torch.no_grad():
        return float((mixer(x_TD[:, None], inputs=inputs)[0][:, 0] - expected).abs().max())


def test_it_is_the_form_with_all_pairs(worker_pool):
    (error,) = worker_pool(1).run(parallel_error)
    assert error < 1e-12
