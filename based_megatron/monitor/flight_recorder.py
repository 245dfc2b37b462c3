"""PyTorch's flight recorder: the last collectives of this rank. PyTorch keeps those of NCCL apart from those of gloo."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DUMPS = {"gloo": "_dump_fr_trace", "nccl": "_dump_nccl_trace"}
"""PyTorch's function for each library's record; a build for CPUs has none for NCCL, which comes last: it may wait for the GPU."""


def write_records(folder: Path, rank: int) -> dict[str, int]:
    """Write a file for each library that carried a collective, for `torchfrtrace --prefix LIBRARY-`.

    Returns the number of the last collective that was begun, by library and process group.
    """
    functions = torch._C._distributed_c10d if dist.is_available() else None
    last: dict[str, int] = {}
    for library, name in DUMPS.items():
        record = pickle.loads(getattr(functions, name)()) if hasattr(functions, name) else {}
        if record.get("entries"):
            # That of gloo names no groups, without which the tool fails.
            record["pg_config"] = _groups() | record["pg_config"]
            record_path(folder, library, rank).write_bytes(pickle.dumps(record))
            last |= {f"{library} {group}": number for group, number in _last_collectives(record).items()}
    return last


def record_path(folder: Path, library: str, rank: int) -> Path:
    """The file of a rank: the tool wants its number at the end."""
    return folder / f"{library}-{rank:05d}"


def _last_collectives(record: dict[str, Any]) -> dict[str, int]:
    last: dict[str, int] = {}
    for entry in record["entries"]:
        if not entry["is_p2p"]:
            group = " ".join(entry["process_group"])
            last[group] = max(int(entry["collective_seq_id"]), last.get(group, 0))
    return last


def _groups() -> dict[str, dict[str, str]]:
    """The process groups of this rank, as NCCL's record has them."""
    return {
        group.group_name: {
            "name": group.group_name, "desc": group.group_desc, "ranks": str(dist.get_process_group_ranks(group)),
        }
        for group in list(dist.distributed_c10d._world.pg_map)
    }  # fmt: skip
