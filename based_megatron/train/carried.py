"""What the layers of a model leave for the next step (parallel/sequence/carried.py), known from the config."""

from collections.abc import Sequence
from math import prod

import torch

from based_megatron.config import Config
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import DTYPES
from based_megatron.model.mixers import layer_mixers
from based_megatron.parallel.sequence.carried import CarriedForm, CarriedState, CarriedStates
from based_megatron.parallel.sharding import ShardSpec
from based_megatron.parallel.topology import Topology


def build_carried_states(
    config: Config, chunks: Sequence[BasedModel], topology: Topology, first_rows: Sequence[int]
) -> CarriedStates:
    """Zeros, which the first step of a run begins with.

    first_rows: row of the global batch that each micro batch of this rank begins with.
    """
    mine = {int(i) + 1 for chunk in chunks for i in chunk.layers}
    lefts = {key: left for key, left in _lefts(config).items() if key[1] in mine and topology.context.rank == 0}
    specs = {key: _spec(config, key, left, topology) for key, left in lefts.items()}

    def zeros() -> CarriedState:
        rows, device = config.train.micro_batch_sequences, topology.device
        return CarriedState(
            {
                key: torch.zeros(rows, *spec.local_shape[1:], dtype=lefts[key].dtype, device=device)
                for key, spec in specs.items()
            }
        )

    return CarriedStates({row: zeros() for row in first_rows}, specs)


def carried_bytes(config: Config) -> int:
    """Of all rows of the global batch, as a checkpoint has them; 0 without data.carry_state."""
    row_bytes = sum(prod(left.shape) * left.dtype.itemsize for left in _lefts(config).values())
    return config.train.global_batch_sequences * row_bytes if config.data.carry_state else 0


def _lefts(config: Config) -> dict[tuple[str, int], CarriedForm]:
    """Of the whole model, by kind and layer number."""
    mixers, dtype = layer_mixers(config.model), DTYPES[config.train.precision]
    return {
        (kind, number): left
        for number, mixer in enumerate(mixers, start=1)
        for kind, left in mixer.leaves(config.model, dtype).items()
    }


def _spec(config: Config, key: tuple[str, int], left: CarriedForm, topology: Topology) -> ShardSpec:
    """As for a parameter [rows of the global batch, ...]; layers are named by their index, as those of weights are."""
    kind, number = key
    return ShardSpec(
        f"layers.{number - 1}.{kind}",
        (config.train.global_batch_sequences, *left.shape),
        partition_dim=1 + left.cut_dim,
        parts=(left.shape[left.cut_dim],),
        rank=topology.tensor.rank,
        size=topology.tensor.size,
    )
