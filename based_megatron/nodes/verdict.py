"""Which nodes are bad, from what was measured. Nodes are compared with each other: a table of what GPUs should reach would age."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from based_megatron.nodes.measure import RankReport

CLOCK_SECONDS = 2.0
"""Clocks that differ by more from that of the first node mix up logs."""
FILE_SHARE = 0.1
"""File systems vary: a node is slow below this share of the median rate."""

MISSING = "missing"
"""Version of what only some ranks have."""


@dataclass(frozen=True)
class Limits:
    """Shares of the median below which something is slow."""

    device: float
    network: float


@dataclass(frozen=True)
class NodeReport:
    """All that is known of one node."""

    host: str
    ranks: Sequence[RankReport]
    """Reports of its ranks that have answered."""
    silent_ranks: Sequence[int] = ()
    clock_seconds: float = 0.0
    """By how much its clock is ahead of the first node's."""
    file_bytes_per_second: float | None = None
    """None: not measured."""
    inside_bytes_per_second: float | None = None
    """Bus bandwidth of an all-reduce over its ranks; None with one rank."""
    neighbours: Mapping[str, float] | None = None
    """By host, the bus bandwidth with a neighbour, 0 if it failed; None with one node."""
    errors: Sequence[str] = ()
    """What failed on it alone, one line each."""


def reasons(reports: Sequence[NodeReport], limits: Limits) -> dict[str, list[str]]:
    """By host, what is wrong with it; nodes with nothing wrong are left out."""
    ranks = [rank for node in reports for rank in node.ranks]
    usual_versions = _usual_versions(ranks)
    usual_product = _most_common(rank.product for rank in ranks)
    matrix = _median(rank.matrix_flops for rank in ranks)
    memory = _median(rank.memory_bytes_per_second for rank in ranks)
    inside = _median(node.inside_bytes_per_second for node in reports)
    files = _median(node.file_bytes_per_second for node in reports)
    between = _median(rate for node in reports for rate in (node.neighbours or {}).values())
    found = {}
    for node in reports:
        lines = list(node.errors)
        if node.silent_ranks:
            lines.append(f"no answer from rank {', '.join(map(str, node.silent_ranks))}")
        for rank in node.ranks:
            lines += _slow(f"matrix rate of rank {rank.rank}", rank.matrix_flops, matrix, limits.device, "FLOP")
            lines += _slow(f"memory rate of rank {rank.rank}", rank.memory_bytes_per_second, memory, limits.device)
            if rank.product != usual_product:
                lines.append(f"rank {rank.rank} computes another product ({rank.product}, others {usual_product})")
            for name, usual in usual_versions.items():
                if (here := rank.versions.get(name, MISSING)) != usual:
                    lines.append(f"{name} of rank {rank.rank} is {here}, others have {usual}")
        lines += _slow("all-reduce inside the node", node.inside_bytes_per_second, inside, limits.network)
        lines += _slow("file system", node.file_bytes_per_second, files, FILE_SHARE)
        if node.neighbours:
            # Slow with one of two neighbours is the neighbour's fault, or the link's.
            lines += _slow("all-reduce with neighbours", max(node.neighbours.values()), between, limits.network)
        if abs(node.clock_seconds) > CLOCK_SECONDS:
            lines.append(f"clock is {node.clock_seconds:+.1f} s from that of {reports[0].host}")
        if lines:
            found[node.host] = lines
    return found


def _slow(what: str, rate: float | None, usual: float | None, share: float, unit: str = "B") -> list[str]:
    if rate == 0:
        return [f"{what} failed"]
    if rate is None or usual is None or rate >= share * usual:
        return []
    return [f"{what} is {rate / 1e9:,.1f} G{unit}/s, {100 * rate / usual:.0f} % of the median"]


def _usual_versions(ranks: Sequence[RankReport]) -> dict[str, str]:
    names = sorted({name for rank in ranks for name in rank.versions})
    return {name: _most_common(rank.versions.get(name, MISSING) for rank in ranks) for name in names}


def _most_common(values) -> str:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else ""


def _median(rates) -> float | None:
    """The upper median: with two nodes, the better one."""
    known = [rate for rate in rates if rate is not None]
    return statistics.median_high(known) if known else None
