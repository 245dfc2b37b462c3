"""Writing of a rank's tensors into several files at a time."""

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

WRITER_THREADS = 4
PART_BYTES = 64 * 2**20
"""Tensors of fewer bytes in all share a file."""


class PartWriter(FileSystemWriter):
    """Writes parts of about equal size, each by a thread into a file of its own.

    DCP has such threads too, but loses their errors: a checkpoint without the tensors of a thread that found the disk full.
    """

    def __init__(self, path: Path) -> None:
        # Files are synced when they are hashed. DCP would copy ahead on the current device of its thread, which is the first one.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        def write(part: tuple[int, list[WriteItem]]) -> list[WriteResult]:
            number, items = part
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            # The explicit super: this is a function of its own.
            written = super(PartWriter, self).write_data(
                dataclasses.replace(plan, items=items, storage_data=prefix), planner
            )
            return written.wait()

        with ThreadPoolExecutor(WRITER_THREADS) as threads:
            results = [result for part in threads.map(write, _parts(plan.items)) for result in part]
        done: Future[Any] = Future()
        done.set_result(results)
        return done


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """The files that a PartWriter has written for a rank, found by their names: the folder, with those of all ranks, is not listed."""
    found: list[Path] = []
    for part in range(WRITER_THREADS):
        paths = (folder / f"__{rank}_{part}_{number}.distcp" for number in itertools.count())
        found += itertools.takewhile(Path.exists, paths)
    return found


def _parts(items: Sequence[WriteItem]) -> list[tuple[int, list[WriteItem]]]:
    """Numbered lists of about equal bytes, at most one for each thread."""
    count = min(WRITER_THREADS, 1 + sum(map(_size_bytes, items)) // PART_BYTES)
    parts: list[list[WriteItem]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item in sorted(items, key=_size_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(item)
        sizes[smallest] += _size_bytes(item)
    return [(number, part) for number, part in enumerate(parts) if part]


def _size_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
