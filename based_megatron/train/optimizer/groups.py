"""Which parameters are decayed."""

from typing import Any

from torch import nn

from based_megatron.config import OptimizerConfig
from based_megatron.model.mixers import Mixer
from based_megatron.parallel.linear import shard_spec


def parameter_groups(module: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay; empty groups are left out."""
    names = decayed_names(module, optimizer.weight_decay_mode)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        (decayed if shard_spec(parameter).name in names else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decayed_names(module: nn.Module, mode: str) -> frozenset[str]:
    """Global names of the parameters that weight decay applies to; mode is optimizer.weight_decay_mode.

    default: no decay on norms and the embedding. reference: as released, where norms are decayed. Mixers decide on their own
    parameters (`Mixer.decays`).
    """
    mixers = [mixer for mixer in module.modules() if isinstance(mixer, Mixer)]
    of_mixers = {shard_spec(p).name: mixer.decays(name) for mixer in mixers for name, p in mixer.named_parameters()}
    names = {shard_spec(parameter).name for parameter in module.parameters()}
    return frozenset(name for name in names if of_mixers.get(name, decays_outside_mixers(name, mode)))


def decays_outside_mixers(name: str, mode: str) -> bool:
    """Whether weight decay applies to a parameter that is no mixer's."""
    return name != "embedding.weight" and (mode == "reference" or not name.endswith("norm.weight"))
