"""The table and the files of a node check."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from based_megatron.nodes.verdict import NodeReport


def table(reports: Sequence[NodeReport], bad: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each node, with the slowest of its ranks, and one for each thing that is wrong."""
    width = max(len("node"), *(len(node.host) for node in reports))
    lines = [f"{'node':{width}}  TFLOP/s  memory GB/s  inside GB/s  between GB/s  files MB/s  clock s"]
    for node in reports:
        cells = (
            _scaled([rank.matrix_flops for rank in node.ranks], 1e12, 9, 2),
            _scaled([rank.memory_bytes_per_second for rank in node.ranks], 1e9, 13, 1),
            _scaled([node.inside_bytes_per_second], 1e9, 13, 1),
            _scaled((node.neighbours or {}).values(), 1e9, 14, 1),
            _scaled([node.file_bytes_per_second], 1e6, 12, 0),
            f"{node.clock_seconds:9.2f}",
        )
        lines.append(f"{node.host:{width}}{''.join(cells)}")
    lines += [f"bad node {host}: {line}" for host, wrong in bad.items() for line in wrong]
    if not bad:
        lines.append(f"{len(reports)} node{'s are' if len(reports) > 1 else ' is'} good")
    return lines


def write_report(reports: Sequence[NodeReport], bad: Mapping[str, Sequence[str]], report: str, bad_nodes: str) -> None:
    """Write the JSON file and the list of bad nodes, where they are asked for."""
    if report:
        document = {"nodes": [dataclasses.asdict(node) for node in reports], "bad": bad}
        Path(report).write_text(json.dumps(document, indent=1))
    if bad_nodes:
        Path(bad_nodes).write_text("".join(f"{host}\n" for host in bad))


def _scaled(rates, unit: float, width: int, digits: int) -> str:
    known = [rate for rate in rates if rate is not None]
    return f"{min(known) / unit:{width}.{digits}f}" if known else f"{'-':>{width}}"
