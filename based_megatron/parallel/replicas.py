"""Weights that several ranks hold alike, compared by fingerprints: a rank whose copy differs has a faulty device, memory or link.

ZeRO-1 and 2 keep all weights of a shard on each of its data x context ranks. Tensor parallel ranks hold copies of what is not cut,
and the last pipeline stage has a copy of a tied embedding. ZeRO-3 keeps one copy of each weight: there is nothing to compare.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from based_megatron.parallel.linear import is_tied_copy, shard_spec
from based_megatron.parallel.topology import Topology

PIECE_ELEMENTS = 1 << 22
"""Elements that are hashed at a time, which bounds the memory that it takes."""
SPREAD = -7046029254386353131
"""An odd number: a product with it modulo 2^64 loses nothing."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """An int64 scalar on the device, the same whatever the order of additions; any flipped bit and any two swapped elements change it."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
        for piece in bits.split(PIECE_ELEMENTS):
            # Sums modulo 2^64, where an odd factor is invertible.
            odd = torch.arange(1, 2 * piece.numel(), 2, device=device)
            total = total * SPREAD + (piece.to(torch.int64) * odd).sum()
    return total


def differing_ranks(parameters: Sequence[nn.Parameter], topology: Topology, tied: bool) -> list[int]:
    """Ranks whose weights are not those of their replicas: the minority, or all of a group without a majority (collective).

    tied: whether the last stage has a copy of the embedding. Waits for the device.
    """
    device = topology.device
    copies = [p for p in parameters if shard_spec(p).partition_dim is None]
    embedding = [p for p in parameters if is_tied_copy(p) or shard_spec(p).name == "embedding.weight"]
    place = torch.stack(
        [torch.full((), rank, device=device) for rank in (topology.tensor.rank, topology.pipeline.rank)]
    )
    row = torch.stack([*place, *(fingerprint(group, device) for group in (parameters, copies, embedding))])
    rows = [torch.empty_like(row) for _ in range(topology.world_size)]
    dist.all_gather(rows, row)
    last = topology.pipeline.size - 1
    return odd_ones(torch.stack(rows).tolist(), last if tied else 0)


def odd_ones(rows: Sequence[Sequence[int]], tied_stage: int) -> list[int]:
    """Ranks that differ, from (tensor rank, stage, fingerprint of all weights, of those that are not cut, of the embedding) of each.

    tied_stage: the stage that has a copy of the embedding of stage 0; 0 if none has.
    """
    groups: dict[tuple[str, int, int], dict[int, int]] = defaultdict(dict)
    for rank, (tensor, stage, weights, copies, embedding) in enumerate(rows):
        groups["weights", tensor, stage][rank] = weights
        groups["copies", 0, stage][rank] = copies
        if tied_stage and stage in (0, tied_stage):
            groups["embedding", tensor, 0][rank] = embedding
    return sorted({rank for group in groups.values() for rank in _minority(group)})


def _minority(group: dict[int, int]) -> list[int]:
    ((value, votes), *others) = Counter(group.values()).most_common()
    if not others:
        return []
    return [rank for rank, found in group.items() if found != value or 2 * votes <= len(group)]
