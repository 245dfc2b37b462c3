"""PyTorch's flight recorder: the last collectives of this rank, whatever carries them."""

import pickle
from typing import Any

import torch


def dump() -> bytes:
    """Its record, in the format of PyTorch's own tools (`torchfrtrace`); empty if this PyTorch has none."""
    functions = torch._C._distributed_c10d if torch.distributed.is_available() else None
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        if hasattr(functions, name):
            return getattr(functions, name)()
    return b""


def last_collectives(record: bytes) -> dict[str, int]:
    """Number of the last collective that was begun, by process group."""
    entries: list[dict[str, Any]] = pickle.loads(record).get("entries", []) if record else []
    last: dict[str, int] = {}
    for entry in entries:
        if not entry["is_p2p"]:
            group = " ".join(entry["process_group"])
            last[group] = max(int(entry["collective_seq_id"]), last.get(group, 0))
    return last
