"""Which parameters are decayed."""

from typing import Any

from torch import nn

from based_megatron.config import OptimizerConfig
from based_megatron.parallel.linear import shard_spec


def parameter_groups(module: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; empty groups are left out.

    default: no decay on norms, biases and the embedding. reference: as released, where norms are decayed.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        (decayed if decays(shard_spec(parameter).name, optimizer.weight_decay_mode) else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, mode: str) -> bool:
    """Whether weight decay applies to the parameter of this global name; mode is optimizer.weight_decay_mode."""
    if name.endswith(".bias") or name == "embedding.weight":
        return False
    return mode == "reference" or not name.endswith("norm.weight")
