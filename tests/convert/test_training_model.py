"""The Hugging Face model is the model that was trained: same tensors, same logits, for every mixer and option."""

import dataclasses

import pytest
import torch

from based_megatron.config import Config
from based_megatron.convert.huggingface import hf_model
from based_megatron.convert.layout import our_shapes
from based_megatron.model.build import build_model
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import build_topology
from support.layouts import SEQUENCE_TOKENS, global_batch, small_config


def trained_model(config: Config) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights by global name and logits [B, T, U] of the training model, on a pool of one rank."""
    topology = build_topology(config.parallel, torch.device("cpu"))
    model = build_model(config, topology, torch.float64)[0]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases start at trivial values
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    plan = whole_sequence(None, SEQUENCE_TOKENS, topology.device)
    with torch.no_grad():
        logits = model(global_batch(0, packed=False)["tokens"], plan).transpose(0, 1).clone()
    return {shard_spec(p).name: p.detach().clone() for p in model.parameters()}, logits


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        # The rotary tables of the training model are float32.
        ({}, 1e-6),
        ({"tie_embeddings": False, "rotary_fraction": 0.5, "rotary_base": 300.0}, 1e-6),
        ({"layer_pattern": "cLcL", "feature_map": "rebased"}, 1e-10),
        ({"layer_pattern": "cLcL", "prefix_tokens": 20}, 1e-10),
        ({"layer_pattern": "cLcL", "prefix_tokens": 20, "feature_map": "rebased"}, 1e-10),
        ({"layer_pattern": "cLcL", "conv_kernel": 5, "conv_expand": 2, "norm_eps": 1e-2, "feature_dim": 6}, 1e-10),
    ],
)
def test_logits_of_the_training_model(worker_pool, changes, tolerance):
    config = small_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    weights, expected = worker_pool(1).run(trained_model, config)[0]
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == our_shapes(config.model)
    found = hf_model(weights, config.model)(global_batch(0, packed=False)["tokens"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
