"""The check of all nodes of a job. Ranks talk through a key-value store: unlike collectives, it tells which of them do not answer."""

import dataclasses
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from based_megatron.errors import TrainingError
from based_megatron.nodes.measure import RankReport, file_rate, measure_rank
from based_megatron.nodes.network import PATIENCE_SECONDS, ROUNDS, all_reduce_rate, begin_together, partner
from based_megatron.nodes.verdict import NodeReport
from based_megatron.parallel.environment import RankInfo, rank_from_environment
from based_megatron.parallel.topology import pick_device

INSIDE = "inside"
GO, END = "go", "end"


def check_nodes(
    folder: Path | None, names: Sequence[str], timeout_seconds: int, leader_rank: int = 0
) -> list[NodeReport] | None:
    """Measure this rank, together with all others. Returns the nodes in rank order on the leader, None on other ranks.

    folder: where the file system is measured; names: nodes in rank order, where they are known; leader_rank: serves the store, on
    the host at MASTER_ADDR. A rank that does not answer in
    time is named in the report of its node, and does not stop the others.
    """
    info = rank_from_environment()
    device = pick_device("auto", info.local_rank)
    store = _store(info, timeout_seconds, leader_rank)
    leader = _Leader(store, info, names, timeout_seconds) if info.rank == leader_rank else None
    local: dict[str, Any] = {"report": dataclasses.asdict(measure_rank(info.rank, device))}
    if folder and info.local_rank == 0:
        try:
            local["files"] = file_rate(folder)
        except OSError as error:
            local["errors"] = [f"file system: {error}"]
    store.set(f"local/{info.rank}", json.dumps(local))
    if leader:
        leader.let_go()
    hosts = json.loads(store.get(GO))
    store.set(f"clock/{info.rank}", str(time.time()))
    rates = _network_rates(store, hosts, info.rank, device)
    store.set(f"network/{info.rank}", json.dumps(rates))
    if leader:
        return leader.collect(hosts)
    store.wait([END])
    store.add("left", 1)
    return None


class _Leader:
    """The part of one rank: it waits for the answers of all ranks, each for a limited time."""

    def __init__(self, store: dist.Store, info: RankInfo, names: Sequence[str], timeout_seconds: int) -> None:
        self._store, self._info, self._names, self._timeout_seconds = store, info, names, timeout_seconds

    def let_go(self) -> None:
        """Tell all ranks which of them have answered, by host: they form the pairs."""
        answered = self._answers("local", self._timeout_seconds)
        hosts: dict[str, list[int]] = defaultdict(list)
        for rank, local in answered.items():
            hosts[local["report"]["host"]].append(rank)
        self._local = answered
        self._store.set(GO, json.dumps(hosts))
        self._clock = time.time()

    def collect(self, hosts: Mapping[str, Sequence[int]]) -> list[NodeReport]:
        """The reports of all nodes, those that never answered last."""
        ranks = [rank for members in hosts.values() for rank in members]
        network = self._answers("network", PATIENCE_SECONDS, ranks)
        clocks = self._answers("clock", 1, ranks)
        silent: dict[str, list[int]] = defaultdict(list)
        for rank in range(self._info.world_size):
            if rank not in network:
                silent[self._host_of(rank, hosts)].append(rank)
        reports = []
        for host, members in hosts.items():
            local, rates = self._local[members[0]], network.get(members[0], {})
            reports.append(
                NodeReport(
                    host=host,
                    ranks=[RankReport(**self._local[rank]["report"]) for rank in members],
                    silent_ranks=silent.pop(host, ()),
                    clock_seconds=float(clocks.get(members[0], self._clock)) - self._clock,
                    file_bytes_per_second=local.get("files"),
                    inside_bytes_per_second=rates.get(INSIDE),
                    neighbours=rates.get("neighbours") or None,
                    errors=local.get("errors", ()),
                )
            )
        reports += [NodeReport(host, (), ranks) for host, ranks in silent.items()]
        self._store.set(END, "")
        self._wait_for_leaving(len(network) - 1)
        return reports

    def _host_of(self, rank: int, hosts: Mapping[str, Sequence[int]]) -> str:
        """The node of a rank that has not answered: that of its neighbours in rank, or the name that was given."""
        size = self._info.node_ranks
        if size:
            for host, members in hosts.items():
                if members[0] // size == rank // size:
                    return host
            if rank // size < len(self._names):
                return self._names[rank // size]
        return f"(node of rank {rank})"

    def _answers(self, kind: str, seconds: float, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """What each rank has set, of those that did within the time."""
        deadline = time.monotonic() + seconds
        found = {}
        for rank in range(self._info.world_size) if ranks is None else ranks:
            key = f"{kind}/{rank}"
            try:
                self._store.wait([key], timedelta(seconds=max(0.05, deadline - time.monotonic())))
            except dist.DistStoreError:
                continue
            found[rank] = json.loads(self._store.get(key))
        return found

    def _wait_for_leaving(self, others: int) -> None:
        """The store ends with this process: it stays until the others have read it."""
        deadline = time.monotonic() + 5
        while self._store.add("left", 0) < others and time.monotonic() < deadline:
            time.sleep(0.01)


def _store(info: RankInfo, timeout_seconds: int, leader_rank: int) -> dist.TCPStore:
    # torchrun's agent has a store at this port already.
    is_master = info.rank == leader_rank and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # A rank waits for the measurements of all others, then for their all-reduces.
    patience = timedelta(seconds=2 * timeout_seconds + PATIENCE_SECONDS)
    try:
        return dist.TCPStore(
            info.master_addr, info.master_port, is_master=is_master, wait_for_workers=False, timeout=patience
        )
    except dist.DistNetworkError as error:
        raise TrainingError(
            f"rank {info.rank} cannot reach rank {leader_rank} at {info.master_addr}:{info.master_port}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _network_rates(
    store: dist.Store, hosts: Mapping[str, Sequence[int]], rank: int, device: torch.device
) -> dict[str, Any]:
    """Rates of this rank's groups: inside its node, and with the nodes next to it. Collective over ranks of `hosts`."""
    names = list(hosts)
    node = next(i for i, host in enumerate(names) if rank in hosts[host])
    found: dict[str, Any] = {"neighbours": {}}

    def rate(name: str, members: Sequence[int]) -> float:
        try:
            return all_reduce_rate(store, name, members, rank, device)
        except RuntimeError as error:
            print(f"based rank {rank}: all-reduce {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            return 0.0

    if len(hosts[names[node]]) > 1:
        found[INSIDE] = rate(f"{INSIDE} {names[node]}", hosts[names[node]])
    for number in range(ROUNDS):
        # Otherwise a node whose partner is held up by a slow one would give its partner up.
        begin_together(store, f"round {number}", sum(map(len, hosts.values())))
        other = partner(node, len(names), number)
        if other is not None:
            low, high = (names[i] for i in sorted((node, other)))
            found["neighbours"][names[other]] = rate(f"{low} {high}", [*hosts[low], *hosts[high]])
    return found
