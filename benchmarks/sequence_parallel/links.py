"""Cost of messages between GPUs: an alpha-beta model whose numbers a YAML or JSON file can replace.

Times are in microseconds, rates in GB/s = 1e9 bytes a second of one GPU and direction.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from based_megatron.errors import ConfigError

Values = TypeVar("Values")


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's ways to move data around a ring.

    Defaults of `Links`: latencies and caps are those of NCCL's tuner for Hopper (src/graph/tuning.cc, baseLat, hwLat, llMaxBws).
    """

    start_us: float
    nvlink_hop_us: float
    nvlink_hop_between_nodes_us: float
    """Latency of a hop inside a node in a ring that also leaves the node."""
    network_hop_us: float
    share: float = 1.0
    """Share of the bandwidth that carries data; the rest carries flags."""
    network_share: float = 1.0
    """Share of the bandwidth in a ring with one GPU of each node."""
    cap_one_node_gb_per_s: float = math.inf
    cap_two_nodes_gb_per_s: float = math.inf
    cap_many_nodes_gb_per_s: float = math.inf

    def cap_gb_per_s(self, nodes: int) -> float:
        """Largest rate over so many nodes."""
        caps = (self.cap_one_node_gb_per_s, self.cap_two_nodes_gb_per_s, self.cap_many_nodes_gb_per_s)
        return caps[min(nodes, 3) - 1]


@dataclass(frozen=True)
class Links:
    """The machines that are modelled: nodes of NVLink GPUs, each with its own InfiniBand port."""

    node_ranks: int = 8
    nvlink_gb_per_s: float = 350.0
    """Assumed: what collectives reach of NVLink 4."""
    network_gb_per_s: float = 45.0
    """Published for a 400G port: 46 to 48 of 50 (nccl-tests)."""
    nvlink_send_us: float = 8.0
    """Assumed: latency of a point to point message inside a node, launch included."""
    network_send_us: float = 12.0
    """Assumed: latency of a point to point message between nodes, launch included."""
    all_to_all_us: float = 10.0
    """Assumed: latency of an all-to-all inside a node."""
    network_all_to_all_us: float = 15.0
    """Assumed: latency of an all-to-all over several nodes."""
    network_all_to_all_rank_us: float = 0.5
    """Assumed: what each rank of another node adds to it."""
    low_latency: Protocol = field(default_factory=lambda: Protocol(6.6, 0.6, 1.08, 2.7, 1.0, 0.25, 141.0, 45.0, 35.0))
    low_latency_128: Protocol = field(default_factory=lambda: Protocol(14.0, 1.9, 1.9, 4.0, 0.92, 0.92))
    simple: Protocol = field(default_factory=lambda: Protocol(8.4, 3.4, 3.4, 14.0))

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        return self.low_latency, self.low_latency_128, self.simple

    def nodes(self, ranks: int) -> int:
        """Nodes that so many consecutive ranks fill or touch."""
        return -(-ranks // self.node_ranks)

    def all_gather_us(self, ranks: int, bytes_of_rank: float) -> float:
        """All-gather around a ring of all ranks, P - 1 steps; NCCL takes the fastest protocol."""
        if ranks < 2:
            return 0.0
        return min(self._steps_us(p, ranks) + self._transfer_us(p, ranks, bytes_of_rank) for p in self.protocols)

    def reduce_scatter_us(self, ranks: int, bytes_of_rank: float, messages: int = 1) -> float:
        """Reduce-scatter of `messages` buckets by the protocol for large ones; a rank keeps bytes_of_rank of each sum."""
        us = messages * self._steps_us(self.simple, ranks) + self._transfer_us(self.simple, ranks, bytes_of_rank)
        return us if ranks > 1 else 0.0

    def rail_all_gather_us(self, nodes: int, bytes_of_rank: float) -> float:
        """All-gather between GPUs of the same place in their nodes."""
        if nodes < 2:
            return 0.0
        return min(
            p.start_us
            + (nodes - 1)
            * (p.network_hop_us + _us(bytes_of_rank, min(p.network_share * self.network_gb_per_s, p.cap_gb_per_s(3))))
            for p in self.protocols
        )

    def rail_doubling_us(self, nodes: int, bytes_of_rank: float) -> float:
        """Exclusive sum by recursive doubling, ceil(log2 N) messages one after another. We have no code for this."""
        return math.ceil(math.log2(nodes)) * self.send_us(bytes_of_rank, network=True) if nodes > 1 else 0.0

    def send_us(self, size_bytes: float, network: bool) -> float:
        """A message from one GPU to another."""
        if network:
            return self.network_send_us + _us(size_bytes, self.network_gb_per_s)
        return self.nvlink_send_us + _us(size_bytes, self.nvlink_gb_per_s)

    def all_to_all_within_us(self, ranks: int, bytes_of_rank: float) -> float:
        """All-to-all of ranks of one node or of several; a rank has so many bytes, of which it keeps 1 / P."""
        inside = min(ranks, self.node_ranks)
        if ranks <= self.node_ranks:
            return self.all_to_all_us + _us((inside - 1) / inside * bytes_of_rank, self.nvlink_gb_per_s)
        others = ranks - self.node_ranks
        return (
            self.network_all_to_all_us
            + self.network_all_to_all_rank_us * others
            + _us(others / ranks * bytes_of_rank, self.network_gb_per_s)
        )

    def two_level_us(self, ranks: int, state_bytes: float, doubling: bool = False) -> float:
        """All-to-all in the nodes, an all-gather between them, all-to-all back; without what the GPUs compute meanwhile."""
        inside = min(ranks, self.node_ranks)
        part, nodes = state_bytes / inside, self.nodes(ranks)
        rail = self.rail_doubling_us(nodes, part) if doubling else self.rail_all_gather_us(nodes, part)
        return 2 * self.all_to_all_within_us(inside, state_bytes) + rail

    def hops_us(self, ranks: int, size_bytes: float) -> list[float]:
        """Times of messages from each rank to the next: P - 1 of them, those between nodes slower."""
        return [self.send_us(size_bytes, network=rank % self.node_ranks == 0) for rank in range(1, ranks)]

    def chain_us(self, ranks: int, state_bytes: float) -> float:
        """A state handed from the first rank to the last, if all are ready at once."""
        return sum(self.hops_us(ranks, state_bytes))

    def ring_attention_us(self, ranks: int, slice_bytes: float) -> float:
        """Keys and values of a slice go around all ranks in P - 1 steps, each as slow as its slowest link."""
        return (ranks - 1) * self.send_us(slice_bytes, network=ranks > self.node_ranks)

    def bus_gb_per_s(self, ranks: int) -> float:
        """Rate of a ring through all GPUs of all nodes, with all their ports."""
        if ranks <= self.node_ranks:
            return self.nvlink_gb_per_s
        return min(self.nvlink_gb_per_s, self.node_ranks * self.network_gb_per_s)

    def _steps_us(self, p: Protocol, ranks: int) -> float:
        between = self.nodes(ranks) - 1
        hop_us = p.nvlink_hop_between_nodes_us if between else p.nvlink_hop_us
        return p.start_us + (ranks - 1 - between) * hop_us + between * p.network_hop_us

    def _transfer_us(self, p: Protocol, ranks: int, bytes_of_rank: float) -> float:
        rate = min(p.share * self.bus_gb_per_s(ranks), p.cap_gb_per_s(self.nodes(ranks)))
        return (ranks - 1) * _us(bytes_of_rank, rate)


def read_links(path: Path | None) -> Links:
    """The defaults, with what a YAML or JSON file sets. Raises ConfigError for a file, key or value that cannot be used."""
    if path is None:
        return Links()
    try:
        # YAML takes 1e-6 for a word, JSON does not.
        values = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--links {path}: {error.strerror}") from error
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"--links {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    return _replaced(Links(), values if values is not None else {}, str(path), "")


def _replaced(base: Values, values: Any, where: str, prefix: str) -> Values:
    """A copy of a dataclass of numbers, and of dataclasses of numbers, with some set."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} is {values!r}; change it to keys with numbers")
    known = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ConfigError(f"{where}: unknown key {name}; change it to one of {', '.join(known)}")
        if dataclasses.is_dataclass(known[key]):
            changes[key] = _replaced(known[key], value, where, f"{name}.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{where}: {name} is {value!r}; change {name} to a number above 0")
        elif isinstance(known[key], int) and value != int(value):
            raise ConfigError(f"{where}: {name} is {value!r}; change {name} to a whole number")
        else:
            changes[key] = type(known[key])(value)
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _us(size_bytes: float, gb_per_s: float) -> float:
    return size_bytes / gb_per_s / 1e3
