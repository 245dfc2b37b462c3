"""Initial weights, drawn from the global name of each parameter, so that every layout starts bit-equal."""

import math
import zlib

import torch
from torch import Tensor, nn

from based_megatron.config import ModelConfig
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.parallel.linear import shard_spec


@torch.no_grad()
def initialize_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of this rank with its part of the unsharded draw."""
    for parameter in model.parameters():
        spec = shard_spec(parameter)
        parameter.copy_(spec.cut(initial_weight(spec.name, spec.shape, config, seed)))


def initial_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The released initialisation of the unsharded parameter `name`, fp32.

    Weights N(0, init_std^2), projections back to the residual N(0, init_std^2 / (2 layers)), conv taps U(-1/sqrt(K), 1/sqrt(K)),
    norms 1, biases 0.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    # The CPU generator reads the low 32 bits of its seed alone.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name.endswith(".conv_weight"):
        bound = 1 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = config.init_std
    if name.endswith((".out_proj.weight", ".fc2.weight")):
        std /= math.sqrt(2 * len(parse_layer_pattern(config.layer_pattern)))
    return torch.empty(shape).normal_(0, std, generator=generator)
