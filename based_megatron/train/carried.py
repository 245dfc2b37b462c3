"""The carried states of a model (parallel/sequence/carried.py), made from its config."""

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
    """The carried states of the first step of a run: zeros.

    first_rows: row of the global batch that each micro batch of this rank begins with.
    """
    mine = {int(i) + 1 for chunk in chunks for i in chunk.layers}
    forms = {key: form for key, form in _forms(config).items() if key[1] in mine and topology.context.rank == 0}
    specs = {key: _spec(config, key, form, topology) for key, form in forms.items()}

    def zeros() -> CarriedState:
        rows, device = config.train.micro_batch_sequences, topology.device
        return CarriedState(
            {
                key: torch.zeros(rows, *spec.local_shape[1:], dtype=forms[key].dtype, device=device)
                for key, spec in specs.items()
            }
        )

    return CarriedStates({row: zeros() for row in first_rows}, specs)


def carried_bytes(config: Config) -> int:
    """Bytes of the carried states of all rows of the global batch, as a checkpoint has them; 0 without data.carry_state."""
    row_bytes = sum(prod(form.shape) * form.dtype.itemsize for form in _forms(config).values())
    return config.train.global_batch_sequences * row_bytes if config.data.carry_state else 0


def _forms(config: Config) -> dict[tuple[str, int], CarriedForm]:
    """Forms of the carried states of the whole model, by kind and layer number."""
    mixers, dtype = layer_mixers(config.model), DTYPES[config.train.precision]
    return {
        (kind, number): form
        for number, mixer in enumerate(mixers, start=1)
        for kind, form in mixer.carried_forms(config.model, dtype).items()
    }


def _spec(config: Config, key: tuple[str, int], form: CarriedForm, topology: Topology) -> ShardSpec:
    """The place of this rank's part, as of a parameter [rows of the global batch, ...]; layers have the index of their weights' names."""
    kind, number = key
    return ShardSpec(
        f"layers.{number - 1}.{kind}",
        (config.train.global_batch_sequences, *form.shape),
        partition_dim=1 + form.cut_dim,
        parts=(form.shape[form.cut_dim],),
        rank=topology.tensor.rank,
        size=topology.tensor.size,
    )
