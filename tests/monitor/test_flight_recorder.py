"""The last collectives of a rank, by library."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from based_megatron.monitor.flight_recorder import record_path, write_records

FORGOTTEN = {"9": {"name": "9", "desc": "tensor", "ranks": "[0]"}}
"""A group that NCCL's record names, and that PyTorch has destroyed by now."""


def of_nccl(number: int, **fields: Any) -> dict[str, Any]:
    """An entry of NCCL's buffer, in the world's group."""
    return {"process_group": ("0", "default_pg"), "collective_seq_id": number, "is_p2p": False, **fields}


def written(folder: Path, *entries: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """What one rank says and writes after three collectives over gloo, where NCCL's buffer has these entries."""
    group = dist.new_group(backend="gloo", group_desc="hosts")
    for _ in range(3):
        dist.all_reduce(torch.ones(1), group=group)
    nccl = {"version": "2.10", "pg_config": FORGOTTEN, "entries": list(entries)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: pickle.dumps(nccl), raising=False)
        last = write_records(folder, 3)
    return last, {path.name: pickle.loads(path.read_bytes()) for path in folder.iterdir()}


def test_each_library_has_a_file(worker_pool, tmp_path):
    """Each counts its own collectives, of a group that both carry too."""
    point_to_point = of_nccl(9, is_p2p=True)
    entries = [of_nccl(6), of_nccl(7), point_to_point, of_nccl(2, process_group=("9", "tensor"))]
    ((last, files),) = worker_pool(1).run(written, tmp_path, *entries)
    assert {name: last[name] for name in last if name.startswith("nccl")} == {
        "nccl 0 default_pg": 7,
        "nccl 9 tensor": 2,
    }
    assert [last[name] for name in last if name.startswith("gloo ") and name.endswith(" hosts")] == [3]
    assert set(files) == {"gloo-00003", "nccl-00003"}
    assert files["nccl-00003"]["entries"] == entries, "in the order of the library, for the tool aligns ranks by it"
    world = {"name": "0", "desc": "default_pg", "ranks": "[0]"}
    assert files["nccl-00003"]["pg_config"].items() >= {"0": world, **FORGOTTEN}.items()
    descriptions = {group["name"]: group["desc"] for group in files["gloo-00003"]["pg_config"].values()}
    assert {tuple(entry["process_group"]) for entry in files["gloo-00003"]["entries"]} <= descriptions.items()


def test_a_library_that_carried_nothing_has_none(worker_pool, tmp_path):
    ((last, files),) = worker_pool(1).run(written, tmp_path)
    assert set(files) == {"gloo-00003"} and all(name.startswith("gloo ") for name in last)
    assert not record_path(tmp_path, "nccl", 3).exists()
