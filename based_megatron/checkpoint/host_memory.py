"""Host memory for one copy of what a rank saves: allocated once, and pinned where the tensors are on a GPU."""

import mmap
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from based_megatron.checkpoint.fragments import Fragment

Key = tuple[str, str, int]
"""(kind, name, start) of a tensor of a fragment."""

_CGROUPS = Path("/sys/fs/cgroup")


class HostCopy:
    """Copies owned fragments from a device, into the same host memory each time."""

    def __init__(self, device: torch.device) -> None:
        self._blocks: dict[Key, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def allocate(self, fragments: Iterable[Fragment]) -> None:
        """Take the memory now. Pinning takes a second for a few GB: call it in the background, before the first copy."""
        for key, tensor in _tensors(fragments):
            self._block(key, tensor)

    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Begin to copy the owned fragments as they are in the order of the device's work; returns the copies.

        On a GPU the copies are whole after `wait`, and what changes the fragments must come after `hold`: the device goes on with
        what only reads them. On a CPU they are whole at once.
        """
        copies = []
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for fragment in fragments:
                if fragment.owned:
                    tensors = {kind: self._copy(fragment, kind) for kind in fragment.tensors}
                    copies.append(Fragment(fragment.spec, fragment.start, fragment.numel, tensors))
            if self._stream is not None:
                self._copied = self._stream.record_event()
        return copies

    def hold(self) -> None:
        """Let the device wait for the last copy before the work that it is given from now on. The host does not wait."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def wait(self) -> None:
        """Wait on the host for the last copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, fragment: Fragment, kind: str) -> Tensor:
        tensor = fragment.tensors[kind].detach()
        if self._stream is not None:
            tensor.record_stream(self._stream)  # a carried state may be freed before it is copied
        return self._block(_key(fragment, kind), tensor).copy_(tensor, non_blocking=True)

    def _block(self, key: Key, like: Tensor) -> Tensor:
        found = self._blocks.get(key)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            found = self._blocks[key] = _host_tensor(like.numel(), like.dtype, pinned=self._stream is not None)
        return found


def copy_bytes(fragments: Iterable[Fragment]) -> int:
    """Host memory that a copy of the owned fragments takes."""
    return sum(tensor.nbytes for _, tensor in _tensors(fragments))


def available_bytes() -> int:
    """Memory that this machine, or the control group (v2) that the process is in, can still give."""
    found = [psutil.virtual_memory().available]
    try:
        group = _CGROUPS / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(_CGROUPS) and (limit := _number(folder / "memory.max")) is not None:
                found.append(limit - (_number(folder / "memory.current") or 0) + _file_cache_bytes(folder))
    except OSError:
        pass
    return max(0, min(found))


def _number(path: Path) -> int | None:
    """The number in a file, None if there is none (`max`, or no such file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _file_cache_bytes(group: Path) -> int:
    """Bytes of files that count as used memory but are given up when memory is asked for."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _tensors(fragments: Iterable[Fragment]) -> Iterable[tuple[Key, Tensor]]:
    for fragment in fragments:
        if fragment.owned:
            for kind, tensor in fragment.tensors.items():
                yield _key(fragment, kind), tensor


def _key(fragment: Fragment, kind: str) -> Key:
    return kind, fragment.spec.name, fragment.start


def _host_tensor(numel: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """A tensor in pages of its own, registered with CUDA if pinned.

    PyTorch's pinned allocator would round up to a power of two. A storage of its own lets torch.save write it without a copy.
    """
    size_bytes = numel * dtype.itemsize
    if not size_bytes:
        return torch.empty(0, dtype=dtype)
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child would share these pages until one writes to them, and the device would then write to the wrong ones.
    pages.madvise(mmap.MADV_DONTFORK)
    tensor = torch.frombuffer(pages, dtype=dtype, count=numel)
    if pinned:
        error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size_bytes, 0))
        if error:
            raise OSError(f"CUDA cannot pin {size_bytes / 2**20:,.0f} MiB of host memory (error {error})")
    return tensor
