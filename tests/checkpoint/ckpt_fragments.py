"""Small sharded parameters and their fragments, without an engine."""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.config import Config, ModelConfig, to_dict
from based_megatron.parallel.sharding import ShardSpec

CONFIG = Config(model=ModelConfig(hidden_size=6))
KINDS = ("model", "exp_avg", "exp_avg_sq")
SHAPES = {
    "embedding.weight": (13, 6),
    "layers.0.mlp.fc1.weight": (10, 6),
    "layers.0.mlp.fc2.weight": (6, 5),
    "norm": (7,),
}
CUTS = {  # partition dim and parts: fc1 is a fused pair, 13 rows and parts of 5 leave padding at 2 ranks
    "embedding.weight": (0, (13,)),
    "layers.0.mlp.fc1.weight": (0, (5, 5)),
    "layers.0.mlp.fc2.weight": (1, (5,)),
    "norm": (None, ()),
}


def full_tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    """Unsharded values by kind and name."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in KINDS}


def specs(rank: int, size: int) -> list[ShardSpec]:
    """Specs of all parameters on one tensor parallel rank."""
    return [ShardSpec(name, SHAPES[name], dim, parts, rank, size) for name, (dim, parts) in CUTS.items()]


def shard(
    full: dict[str, dict[str, Tensor]] | None, tensor_size: int, data_size: int, kinds: Sequence[str] = KINDS
) -> list[list[Fragment]]:
    """Fragments of each of the tensor x data parallel ranks, holding `full`, or a marker value to be overwritten."""
    ranks = []
    for tensor_rank in range(tensor_size):
        for data_rank in range(data_size):
            mine = []
            for spec in specs(tensor_rank, tensor_size):
                numel = prod(spec.local_shape)
                start, stop = numel * data_rank // data_size, numel * (data_rank + 1) // data_size
                tensors = {
                    kind: (spec.cut(full[kind][spec.name]) if full else torch.full(spec.local_shape, 7.0)).reshape(-1)
                    for kind in kinds
                }
                owned = spec.partition_dim is not None or tensor_rank == 0
                pieces = {kind: tensor[start:stop].clone() for kind, tensor in tensors.items()}
                mine.append(Fragment(spec, start, stop - start, pieces, owned))
            ranks.append(mine)
    return ranks


def flat(ranks: list[list[Fragment]]) -> list[Fragment]:
    """The fragments of all ranks, as if one rank held them."""
    return [fragment for rank in ranks for fragment in rank]


def save(folder: Path, step: int) -> Path:
    """A checkpoint of the values that belong to a step, as one process that holds the fragments of four ranks."""
    state = {"consumed_tokens": step * 10, "config": to_dict(CONFIG)}
    return save_checkpoint(folder, step, flat(shard(full_tensors(step), 2, 2)), state)
