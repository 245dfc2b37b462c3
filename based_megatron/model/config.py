"""The config object that Megatron's layers and our mixers share."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.parallel.megatron import LayerConfig, megatron_settings
from based_megatron.parallel.tensor_overlap import TensorRanks


@dataclass
class BasedConfig(LayerConfig):
    """Megatron's TransformerConfig, with the architecture as one more field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    backend: str = "reference"
    """Kernels of the mixers, already resolved."""
    recompute: Literal["none", "mixer", "full"] = "none"
    """Activations to recompute in backward."""

    @property
    def residual_dtype(self) -> torch.dtype:
        """fp32, as released, whatever the weights are (fp64 under fp64 weights)."""
        return torch.promote_types(self.params_dtype, torch.float32)


def residual_std(model: ModelConfig) -> float:
    """Standard deviation of the initial weights of projections back to the residual: init_std / sqrt(2 layers)."""
    return model.init_std / math.sqrt(2 * len(parse_layer_pattern(model.layer_pattern)))


def based_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    backend: str,
    recompute: Literal["none", "mixer", "full"],
    tensor_ranks: TensorRanks | None = None,
) -> BasedConfig:
    """The shared config of one layout."""
    settings = megatron_settings(
        num_layers=len(parse_layer_pattern(model.layer_pattern)),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_heads=model.num_heads,
        parallel=parallel,
        dtype=dtype,
    )
    return BasedConfig(**settings, tensor_ranks=tensor_ranks, model=model, backend=backend, recompute=recompute)
