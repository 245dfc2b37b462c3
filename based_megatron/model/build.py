"""Builds the model chunks of one rank from a config and a topology."""

from typing import Any

import torch

from based_megatron.config import Config, ModelConfig, ParallelConfig
from based_megatron.config.pattern import parse_fp8_layers, parse_layer_pattern
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.based_model import BasedModel
from based_megatron.model.config import BasedConfig, based_config
from based_megatron.model.init import initialize_weights
from based_megatron.parallel.fp8 import use_fp8
from based_megatron.parallel.linear import attach_shard_specs
from based_megatron.parallel.megatron import megatron_runs
from based_megatron.parallel.stages import split_layers
from based_megatron.parallel.symmetric import overlapping_ranks
from based_megatron.parallel.topology import Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""Types of weights and activations. In fp8 only operands of products are shorter."""


def build_model(config: Config, topology: Topology, dtype: torch.dtype | None = None) -> list[BasedModel]:
    """The model chunks of this pipeline rank, initialised and on the device; more than one only under the interleaved schedule.

    dtype: instead of train.precision's, for tests.
    """
    layers = len(parse_layer_pattern(config.model.layer_pattern))
    stages = split_layers(layers, topology.pipeline.rank, topology.pipeline.size, config.parallel.virtual_pipeline)
    with megatron_runs():
        shared = based_config(
            config.model,
            config.parallel,
            dtype=dtype or DTYPES[config.train.precision],
            backend=resolve_backend(config.train.backend, topology.device),
            recompute=config.train.recompute,
            tensor_ranks=overlapping_ranks(config.parallel, topology.tensor.group, topology.device),
        )
        return [_build_chunk(config, shared, topology, stage) for stage in stages]


def whole_model(model: ModelConfig, topology: Topology, dtype: torch.dtype, backend: str) -> BasedModel:
    """All layers of the model on the device of this rank, which may share them with tensor parallel ranks; weights are yet to be set.

    backend: resolved.
    """
    parallel = ParallelConfig(tensor=topology.tensor.size, sequence_parallel=False)
    (stage,) = split_layers(len(parse_layer_pattern(model.layer_pattern)), 0, 1, 1)
    with megatron_runs():
        shared = based_config(model, parallel, dtype=dtype, backend=backend, recompute="none")
        built = BasedModel(shared, stage, topology.process_groups)
        attach_shard_specs(built, topology.tensor.group)
    return built.to(topology.device)


def _build_chunk(config: Config, shared: BasedConfig, topology: Topology, stage) -> BasedModel:
    chunk = BasedModel(shared, stage, topology.process_groups)
    attach_shard_specs(chunk, topology.tensor.group)
    if stage.is_last and not stage.is_first and config.model.tie_embeddings:
        # The first stage owns the tied embedding: this copy counts once, in norms and checkpoints.
        chunk.embedding.weight.tied_copy = True
    initialize_weights(chunk, config.model, config.train.seed)
    chunk.to(topology.device)
    if config.train.precision == "fp8":
        picked = parse_fp8_layers(config.train.fp8_layers, shared.num_layers)
        blocks: list[Any] = [block for name, block in chunk.layers.items() if int(name) in picked]
        use_fp8(blocks, shared.backend, is_sharded=config.parallel.zero_stage == 3)
        for block in blocks:
            block.hand_on_fp8()
    return chunk
