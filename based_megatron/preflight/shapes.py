"""The parameters that one rank holds, from the config alone: names, elements after tensor parallel cuts, weight decay groups."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from based_megatron.config import Config
from based_megatron.model.mixers import layer_mixers, parameter_owner
from based_megatron.parallel.sharding import VOCAB_MULTIPLE, ShardSpec
from based_megatron.parallel.stages import Stage, split_layers
from based_megatron.train.optimizer.groups import decays_outside_mixers
from based_megatron.train.optimizer.muon import is_matrix


@dataclass(frozen=True)
class LocalParameter:
    """One parameter on one rank."""

    name: str
    numel: int
    decayed: bool
    """Which of the two groups of the optimizer has it."""
    is_matrix_of_block: bool
    """Whether Muon updates it."""


def stages_of_rank(config: Config, pipeline_rank: int) -> list[Stage]:
    """The model chunks of one pipeline rank."""
    layers, parallel = len(layer_mixers(config.model)), config.parallel
    return split_layers(layers, pipeline_rank, parallel.pipeline, parallel.virtual_pipeline)


def local_parameters(config: Config, pipeline_rank: int) -> list[LocalParameter]:
    """Parameters of a rank of this pipeline stage, in the order of the model; tensor parallel ranks hold equal numbers."""
    return [
        LocalParameter(spec.name, prod(spec.local_shape), _is_decayed(config, spec), is_matrix(spec))
        for stage in stages_of_rank(config, pipeline_rank)
        for spec in stage_parameters(config, stage)
    ]


def stage_parameters(config: Config, stage: Stage) -> Iterator[ShardSpec]:
    """The parameters of a model chunk as tensor parallel rank 0 holds them."""
    model, mixers = config.model, layer_mixers(config.model)
    D, F, size = model.hidden_size, model.ffn_hidden_size, config.parallel.tensor
    rows = config.model.embedding_rows

    def cut(name: str, shape: tuple[int, ...], dim: int, multiple: int = 1) -> ShardSpec:
        return ShardSpec(name, shape, dim, (shape[dim],), size=size, multiple=multiple)

    if stage.is_first or (stage.is_last and model.tie_embeddings):
        yield cut("embedding.weight", (rows, D), 0, VOCAB_MULTIPLE)
    for i in stage.layers:
        yield ShardSpec(f"layers.{i}.mixer_norm.weight", (D,), size=size)
        for local, shape in mixers[i].parameter_shapes(model).items():
            name, dim = f"layers.{i}.mixer.{local}", mixers[i].tensor_dim(local)
            yield ShardSpec(name, shape, size=size) if dim is None else cut(name, shape, dim)
        yield ShardSpec(f"layers.{i}.mlp_norm.weight", (D,), size=size)
        yield ShardSpec(f"layers.{i}.mlp.fc1.weight", (2 * F, D), 0, (F, F), size=size)
        yield cut(f"layers.{i}.mlp.fc2.weight", (D, F), 1)
    if stage.is_last:
        yield ShardSpec("final_norm.weight", (D,), size=size)
        if not model.tie_embeddings:
            yield cut("output.weight", (rows, D), 0, VOCAB_MULTIPLE)


def _is_decayed(config: Config, spec: ShardSpec) -> bool:
    owner = parameter_owner(spec.name, layer_mixers(config.model))
    if owner is not None:
        mixer, local = owner
        return mixer.decays(local)
    return decays_outside_mixers(spec.name, config.optimizer.weight_decay_mode)
