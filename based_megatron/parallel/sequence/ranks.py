"""The ranks that share a sequence, and the channels between them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from based_megatron.errors import ConfigError
from based_megatron.parallel.sequence.channel import Channel, GroupChannel, Traffic

Algorithm = Literal["auto", "all_gather", "two_level", "chain"]


@dataclass(frozen=True)
class ContextRanks:
    """This rank's place among those that share a sequence. States and halos have channels of their own: neither waits for the other."""

    rank: int
    size: int
    states: Channel | None = None
    """All ranks; None with one rank, as all channels."""
    halos: Channel | None = None
    """All ranks."""
    node: Channel | None = None
    """Consecutive ranks of one node, equally many on each; None if the ranks do not fill nodes so."""
    rail: Channel | None = None
    """Ranks with the same place in their nodes, in order of the nodes; None with one node."""
    algorithm: Algorithm = "auto"
    """How states are exchanged: parallel.state_exchange."""
    traffic: Traffic = field(default_factory=Traffic)
    """What this rank has sent and received."""
    side_stream: torch.cuda.Stream | None = None
    """The stream that exchanges of several steps run on, while the computation goes on; None on a CPU."""


ONE_RANK = ContextRanks(0, 1)


def build_context_ranks(
    group: dist.ProcessGroup, algorithm: Algorithm, node_ranks: int, device: torch.device, timeout: timedelta
) -> ContextRanks:
    """Make the groups of the exchanges, over the ranks of `group`. Every rank of the run calls it.

    node_ranks: ranks of a node, numbered one after another; 0 if unknown. timeout: after which an exchange ends the run.
    Raises ConfigError for two_level where context ranks do not fill nodes.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return ContextRanks(rank, size, algorithm=algorithm)
    mine = dist.get_process_group_ranks(group)
    everyones: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, mine)
    families = sorted({tuple(ranks) for ranks in everyones})
    traffic = Traffic()
    halos = _new_channel(families, traffic, device, timeout)
    node = rail = None
    nodes = [split_into_nodes(ranks, node_ranks) for ranks in families]
    if all(nodes):
        node = _new_channel([part for parts in nodes for part in parts], traffic, device, timeout)
        if len(nodes[0]) > 1:
            rails = [rail for parts in nodes for rail in zip(*parts, strict=True)]
            rail = _new_channel(rails, traffic, device, timeout)
    elif algorithm == "two_level":
        raise ConfigError(
            f"parallel.state_exchange is two_level but context ranks {mine} do not fill nodes of {node_ranks or 'unknown'} ranks evenly; "
            f"set parallel.state_exchange to auto or change parallel.context"
        )
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    return ContextRanks(rank, size, GroupChannel(group, traffic), halos, node, rail, algorithm, traffic, stream)


def split_into_nodes(ranks: Sequence[int], node_ranks: int) -> list[tuple[int, ...]]:
    """Runs of ranks that share a node; empty unless all are equally long, and longer than one."""
    if node_ranks < 1:
        return []
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] // node_ranks == rank // node_ranks:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    lengths = {len(run) for run in runs}
    return [tuple(run) for run in runs] if len(lengths) == 1 and lengths != {1} else []


def _new_channel(
    families: Sequence[Sequence[int]], traffic: Traffic, device: torch.device, timeout: timedelta
) -> GroupChannel:
    """The channel of the family that has this rank. All ranks make all groups, in the same order."""
    groups = [(ranks, dist.new_group(list(ranks), timeout=timeout)) for ranks in families]
    group = next(group for ranks, group in groups if dist.get_rank() in ranks)
    # Connections are made now, by all ranks together, and not within the first step.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return GroupChannel(group, traffic)
