"""Which parameters are decayed, and what DeepSpeed is told."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from based_megatron.config import OptimizerConfig, ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.model.build import build_model
from based_megatron.parallel.deepspeed import deepspeed_settings
from based_megatron.parallel.linear import shard_spec
from based_megatron.parallel.topology import build_topology
from based_megatron.train.optimizer import build_engine, parameter_groups, set_learning_rate
from based_megatron.train.optimizer.adamw import adam_settings
from support.cases import each
from support.layouts import small_config
from support.pool import rank_device

MATRICES = {"qkv.weight", "in_proj.weight", "out_proj.weight", "conv_weight", "fc1.weight", "fc2.weight"}
NORMS = {"mixer_norm.weight", "mlp_norm.weight", "final_norm.weight"}
BIASES = {"in_proj.bias", "out_proj.bias"}


def groups_of_a_model(mode: Any, tied: bool) -> dict[float, set[str]]:
    """Endings of parameter names by weight decay, for a model with every mixer."""
    config = small_config()
    model = dataclasses.replace(config.model, layer_pattern="cLSA", tie_embeddings=tied)
    topology = build_topology(config.parallel, rank_device(0))
    (chunk,) = build_model(dataclasses.replace(config, model=model), topology)
    groups = parameter_groups(chunk, OptimizerConfig(weight_decay=0.25, weight_decay_mode=mode))
    assert sorted(map(id, chunk.parameters())) == sorted(id(p) for group in groups for p in group["params"])
    return {group["weight_decay"]: {ending(shard_spec(p).name) for p in group["params"]} for group in groups}


def ending(name: str) -> str:
    """layers.3.mixer.qkv.weight -> qkv.weight"""
    return re.sub(r"^layers\.\d+\.(mixer\.|mlp\.)?", "", name)


@pytest.mark.parametrize(
    ("mode", "decayed", "others"),
    [
        ("default", MATRICES, NORMS | BIASES | {"embedding.weight"}),
        ("reference", MATRICES | NORMS, BIASES | {"embedding.weight"}),
    ],
)
def test_what_is_decayed(worker_pool, mode, decayed, others):
    """reference: the released code decays its norms, and neither biases nor the embedding."""
    (found,) = worker_pool(1).run(each, groups_of_a_model, [(mode, True), (mode, False)])
    assert found[mode, True] == {0.25: decayed, 0.0: others}
    assert found[mode, False] == {0.25: decayed | {"output.weight"}, 0.0: others}


def named(*names: str) -> nn.Module:
    """A module of parameters with these global names."""
    module = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in names)
    for name, parameter in zip(names, module, strict=True):
        parameter.shard_spec = SimpleNamespace(name=name)  # type: ignore[attr-defined]
    return module


def test_a_group_without_parameters_is_left_out():
    (group,) = parameter_groups(named("layers.0.mlp.fc1.weight"), OptimizerConfig(weight_decay=0.5))
    assert group["weight_decay"] == 0.5
    (group,) = parameter_groups(named("layers.0.mixer_norm.weight"), OptimizerConfig(weight_decay=0.5))
    assert group["weight_decay"] == 0.0


def refused_groups() -> str:
    """The second stage of two has neither biases nor an embedding."""
    config = small_config(ParallelConfig(pipeline=2))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layer_pattern="LL", tie_embeddings=False),
        optimizer=OptimizerConfig(weight_decay_mode="reference"),
    )
    topology = build_topology(config.parallel, rank_device(dist.get_rank()))
    try:
        build_engine(build_model(config, topology), config, topology)
    except ConfigError as error:
        return str(error)
    return ""


def test_stages_with_unequal_groups_are_refused_on_every_rank(worker_pool):
    """DeepSpeed would wait forever."""
    for line in worker_pool(2).run(refused_groups):
        assert "from 1 to 2 weight decay groups" in line and "optimizer.weight_decay_mode=default" in line


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_settings(stage, bf16):
    parallel = ParallelConfig(zero_stage=stage, zero_bucket_elements=1234)
    settings = deepspeed_settings(parallel, OptimizerConfig(clip_grad_norm=0.7), bf16)
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (stage, 1234, 1234)
    assert settings["gradient_clipping"] == 0.7
    assert settings["communication_data_type"] == "fp32", "gradients would be summed in bf16"
    assert settings["gradient_accumulation_steps"] == 1 and settings["managed_gradient_accumulation"] is False
    assert ("bf16" in settings) == bf16
    if bf16:
        assert settings["bf16"] == {"enabled": True, "immediate_grad_update": True}
        assert settings["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_rate_is_set_in_every_group():
    groups = [{"lr": 1.0}, {"lr": 2.0}]
    set_learning_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), 0.5)
    assert groups == [{"lr": 0.5}, {"lr": 0.5}]


def test_adamw_takes_its_constants_from_the_config():
    """Two steps of the formula in Loshchilov and Hutter, written out, with other constants than the defaults."""
    config = OptimizerConfig(lr=0.1, beta1=0.5, beta2=0.75, eps=0.01)
    module = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    expected, first, second = module.weight.detach().clone(), torch.zeros(2, 2), torch.zeros(2, 2)
    client = torch.optim.AdamW([{"params": [module.weight], "weight_decay": 0.25}], **adam_settings(config))
    for step in (1, 2):
        gradient_22 = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64) * step
        module.weight.grad = gradient_22
        client.step()
        first = 0.5 * first + 0.5 * gradient_22
        second = 0.75 * second + 0.25 * gradient_22**2
        expected *= 1 - 0.1 * 0.25
        expected -= 0.1 * (first / (1 - 0.5**step)) / ((second / (1 - 0.75**step)).sqrt() + 0.01)
        torch.testing.assert_close(module.weight.detach(), expected, rtol=1e-12, atol=1e-12)
