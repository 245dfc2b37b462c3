"""The command `based nodes`: how fast and how right the nodes of a job are, before it trains on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from based_megatron.config.limits import Range, check_limits, flag


@dataclass(frozen=True)
class NodesOptions:
    """Measure every node of a job and name those that are slow or wrong. Every rank runs this: srun or `based launch local` starts it."""

    folder: str = ""
    """Folder of the run: its file system is written and read. Empty: not measured."""
    report: str = ""
    """JSON file for all that was measured."""
    bad_nodes: str = ""
    """Text file for the names of bad nodes, one a line."""
    minimum_share: Annotated[float, Range(above=0, at_most=1)] = 0.85
    """A device is slow below this share of the median matrix or memory rate."""
    minimum_network_share: Annotated[float, Range(above=0, at_most=1)] = 0.5
    """A node is slow if all-reduces with each of its neighbours are below this share of the median rate."""
    names: str = ""
    """Names of the job's nodes in rank order, with commas or spaces between, so that one that never answers can be named."""
    timeout_seconds: Annotated[int, Range(at_least=1, at_most=86_400)] = 120
    """A rank that has not answered for so long is taken for dead."""
    leader: Annotated[int, Range(at_least=0)] = 0
    """Rank on the host at MASTER_ADDR, which all others talk to. Another one than 0 where that host itself is sick."""


def main(argv: Sequence[str]) -> int:
    """Print a table on the leader. Returns 1 there if a node is bad, else 0."""
    options = tyro.cli(NodesOptions, prog="based nodes", args=list(argv))
    check_limits(options, flag)
    from based_megatron.nodes.check import check_nodes
    from based_megatron.nodes.report import table, write_report
    from based_megatron.nodes.verdict import Limits, reasons

    folder, names = Path(options.folder) if options.folder else None, options.names.replace(",", " ").split()
    reports = check_nodes(folder, names, options.timeout_seconds, options.leader)
    if reports is None:
        return 0
    bad = reasons(reports, Limits(options.minimum_share, options.minimum_network_share))
    print("\n".join(table(reports, bad)), flush=True)
    write_report(reports, bad, options.report, options.bad_nodes)
    return 1 if bad else 0
