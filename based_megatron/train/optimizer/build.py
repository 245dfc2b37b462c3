"""From a model and a config to an engine that trains it."""

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from based_megatron.config import Config, OptimizerConfig
from based_megatron.errors import ConfigError
from based_megatron.model.based_model import BasedModel
from based_megatron.parallel.deepspeed import ZeroEngine, build_zero_engine, deepspeed_settings
from based_megatron.parallel.partitions import PartitionedOptimizer
from based_megatron.parallel.topology import Topology


def build_engine(chunks: list[BasedModel], config: Config, topology: Topology) -> ZeroEngine:
    """A ZeRO engine over the model chunks of this rank. All ranks call it."""
    module = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    optimizer = build_optimizer(module, config.optimizer, topology)
    _check_equal_groups(optimizer.param_groups, topology)
    settings = deepspeed_settings(config.parallel, config.optimizer, bf16=config.train.precision != "fp32")
    readers = [reader for chunk in chunks for reader in chunk.readers()]
    return build_zero_engine(module, optimizer, topology, config.parallel, settings, readers)


def build_optimizer(module: nn.Module, config: OptimizerConfig, topology: Topology) -> PartitionedOptimizer:
    """The optimizer that config.name names, over the parameters of this rank."""
    found = importlib.import_module(f"based_megatron.train.optimizer.{config.name}")
    return found.Optimizer.build(module, config, topology)


def set_learning_rate(engine: ZeroEngine, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _check_equal_groups(groups: list[dict[str, Any]], topology: Topology) -> None:
    # DeepSpeed reduces the norm of each group over all stages: a stage with fewer groups would leave the others waiting.
    counts = torch.tensor([len(groups), -len(groups)], device=topology.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MIN, group=topology.model.group)
    if int(counts[0]) != -int(counts[1]):
        raise ConfigError(
            f"pipeline stages have from {int(counts[0])} to {-int(counts[1])} weight decay groups, because some hold neither biases nor "
            f"embeddings; set optimizer.weight_decay_mode=default or lower parallel.pipeline"
        )
