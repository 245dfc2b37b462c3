"""What the ranks of a large job ask of a shared file system: no more than grows with their number."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist
from ckpt_fragments import full_tensors, shard

from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.ranks import all_ranks
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import newest_valid


def accesses(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """(saving, finding and loading): how often this rank opened each file of a checkpoint, or listed a folder."""
    ranks, seen = all_ranks(), Counter[str]()

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, os.PathLike)):
            path = Path(arguments[0])
            if folder in (path, *path.parents):
                seen["a list" if event != "open" or path.is_dir() else path.name] += 1

    sys.addaudithook(watch)
    save_checkpoint(folder, 1, shard(full_tensors(1), 1, ranks.size)[ranks.rank], {}, ranks)
    dist.barrier()
    saved, seen = seen, Counter()
    path = newest_valid(folder, lambda line: None, ranks)
    assert path is not None
    load_checkpoint(path, shard(None, 1, ranks.size)[ranks.rank], ranks=ranks)
    return saved, seen


@pytest.fixture(scope="module")
def of_ranks(worker_pool, tmp_path_factory) -> dict[int, list[tuple[Counter[str], Counter[str]]]]:
    return {size: worker_pool(size).run(accesses, tmp_path_factory.mktemp("run")) for size in (2, 4)}


def test_the_files_that_grow_with_the_ranks_are_read_as_often_by_four_as_by_two(of_ranks):
    """If each rank read the list of all ranks' files, 512 of them would read its square."""
    totals = []
    for found in of_ranks.values():
        total = sum((loaded for _, loaded in found), Counter())
        totals.append({name: count for name, count in total.items() if not name.endswith(".distcp")})
    assert totals[0] == totals[1] and totals[0].keys() >= {".metadata", "manifest.json", "state.json"}


def test_each_rank_writes_its_own_files_and_looks_at_no_others(of_ranks):
    for found in of_ranks.values():
        for rank, (saved, _) in enumerate(found[1:], start=1):
            assert saved and all(name.startswith(f"__{rank}_") for name in saved), saved
