"""Initial weights, drawn from the global name of each parameter, so that every layout starts bit-equal."""

import zlib

import torch
from torch import Tensor, nn

from based_megatron.config import ModelConfig
from based_megatron.model.config import residual_std
from based_megatron.model.mixers import layer_mixers, parameter_owner
from based_megatron.parallel.linear import shard_spec


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of this rank with its part of the unsharded draw."""
    for parameter in model.parameters():
        spec = shard_spec(parameter)
        parameter.copy_(spec.cut(initial_weight(spec.name, spec.shape, config, seed)))


def initial_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The released initialisation of the unsharded parameter `name`, fp32.

    Norms 1, weights N(0, init_std^2), the MLP's projection back to the residual N(0, init_std^2 / (2 layers)); a mixer
    initialises its own.
    """
    # The CPU generator reads the low 32 bits of its seed alone.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    owner = parameter_owner(name, layer_mixers(config))
    if owner is not None:
        mixer, local = owner
        return mixer.initial(local, shape, config, generator)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = residual_std(config) if name.endswith(".fc2.weight") else config.init_std
    return torch.empty(shape).normal_(0, std, generator=generator)
