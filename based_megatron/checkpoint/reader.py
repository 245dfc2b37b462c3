"""Reading of stored tensors by the bytes that a rank needs, several files at a time."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

READER_THREADS = 4


class RangeReader(FileSystemReader):
    """Reads of each stored rectangle the bytes from its first to its last element that is asked for, and no others.

    DCP's reader takes the whole rectangle, one after another: on 64 ranks, each would read an embedding that one rank had saved.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        """metadata: the checkpoint's, which one rank has read for all."""
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._stored = {
            (name, tuple(chunk.offsets)): (tuple(chunk.sizes), entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        with ThreadPoolExecutor(READER_THREADS) as threads:
            for _ in threads.map(lambda name: self._read_file(name, by_file[name], planner), sorted(by_file)):
                pass
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, name: str, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        with open(Path(self.path) / name, "rb", buffering=0) as file:
            for item in sorted(items, key=lambda item: self.storage_data[item.storage_index].offset):
                assert item.storage_index.offset is not None
                shape, dtype = self._stored[item.storage_index.fqn, tuple(item.storage_index.offset)]
                info = self.storage_data[item.storage_index]
                start = info.offset + _data_offset(file, info.offset, info.length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(_read_box(file, start, shape, dtype, tuple(item.storage_offsets), tuple(item.lengths)))
                planner.commit_tensor(item, target)


class _Window:
    """A part of a file as a file of its own, for torch's reader of archives."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = file.fileno(), offset, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._at
        found = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._at)
        self._at += len(found)
        return found


def _data_offset(file: BinaryIO, offset: int, length: int) -> int:
    """Where the numbers of a tensor begin in what torch.save wrote of it: an archive that keeps them as they are."""
    archive = torch._C.PyTorchFileReader(cast(BinaryIO, _Window(file, offset, length)))
    return archive.get_record_offset("data/0")  # type: ignore[attr-defined]


def _read_box(
    file: BinaryIO,
    start: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    offsets: Sequence[int],
    lengths: Sequence[int],
) -> Tensor:
    """The box at `offsets` of a row-major tensor that begins at byte `start` of the file."""
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    last = first + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))
    buffer = bytearray((last - first + 1) * dtype.itemsize)
    view, at = memoryview(buffer), start + first * dtype.itemsize
    while view:
        count = os.preadv(file.fileno(), [view], at)
        if not count:
            raise EOFError(f"{file.name} ends before byte {at + len(view)}")
        view, at = view[count:], at + count
    return torch.frombuffer(buffer, dtype=dtype).as_strided(lengths, strides)
