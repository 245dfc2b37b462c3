"""The saves of a run, one at a time: tensors are copied to host memory, and a thread writes the copy while training goes on.

    training   step | copy | step | step | step | step ...
    host              copy | write, hash, sync, rename, prune |
    device            weights and moments on their way while the next step reads them; its update waits for the copy

The thread's collectives have a group of their own: they meet those of the other ranks' threads, never those of training.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from based_megatron.checkpoint.background import Background
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.host_memory import HostCopy, available_bytes, copy_bytes
from based_megatron.checkpoint.ranks import Ranks
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import Kept, prune, step_name
from based_megatron.errors import CheckpointError

GIB = 2**30


@dataclass(frozen=True)
class Saved:
    """How a save ended. Whether it worked is the same on all ranks."""

    step: int
    path: Path
    error: str
    """Why it failed, in one line; empty if it worked."""
    warning: str
    """On rank 0, why older checkpoints could not be deleted; empty if they were."""
    copy_seconds: float
    """How long training stood still for the copy; 0 where the tensors themselves are written."""
    write_seconds: float
    """From there until the checkpoint had its name and older ones were deleted."""


class Saver:
    """Writes the checkpoints of one folder. All ranks call its methods at the same steps; collective ones say so."""

    def __init__(self, folder: Path, kept: Kept, ranks: Ranks, writers: Ranks, device: torch.device) -> None:
        """writers: the same ranks as `ranks`, with a group that only the saver's threads use."""
        self._folder, self._kept, self._ranks, self._writers, self._device = folder, kept, ranks, writers, device
        self._copy: HostCopy | None = None
        self._allocation: Background[None] | None = None
        self._writing: Background[Saved] | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save was started that `finish` has not ended. Equal on all ranks."""
        return self._writing is not None

    @property
    def asynchronous(self) -> bool:
        """Whether training needs to wait for the copy only. Equal on all ranks."""
        return self._copy is not None

    def take_memory(self, fragments: Sequence[Fragment]) -> str:
        """Make saves asynchronous (collective): host memory for copies of such fragments is taken in the background.

        Returns a line that says why not if a host has too little; saves are then as before.
        """
        everywhere = self._ranks.together(lambda: (socket.gethostname(), copy_bytes(fragments), available_bytes()))
        for host in sorted({host for host, _, _ in everywhere}):
            needed = sum(copy for name, copy, _ in everywhere if name == host)
            available = min(free for name, _, free in everywhere if name == host)
            if needed > available:
                return (
                    f"training waits until saves are written: copies need {needed / GIB:.1f} GiB of host memory on {host}, which has "
                    f"{available / GIB:.1f} GiB; use fewer ranks a node, or checkpoint.asynchronous=false to say so"
                )
        copy = self._copy = HostCopy(self._device)

        def allocate() -> None:
            with self._on_device():
                copy.allocate(fragments)

        self._allocation = Background(allocate, "checkpoint memory")
        return ""

    def start(self, step: int, fragments: Sequence[Fragment], state: Mapping[str, Any], prunes: bool) -> str:
        """Begin a save (collective). None may be in flight. Returns a line if saves can no longer be asynchronous.

        The fragments may change after `finish`, or, if saves are asynchronous, after `hold_update`.
        prunes: older checkpoints go when this one is whole.
        """
        assert not self.in_flight, "one save at a time"
        problem = self._await_memory()
        started = time.perf_counter()
        copied = fragments if self._copy is None else self._copy.copy(fragments)
        copy_seconds = time.perf_counter() - started if self.asynchronous else 0.0
        unfinished = Saved(step, self._folder / step_name(step), "", "", copy_seconds, 0.0)
        self._writing = Background(lambda: self._write(unfinished, copied, state, prunes), f"checkpoint {step}")
        return problem

    def hold_update(self) -> None:
        """Let the device finish the copy before the work that it is given from now on; the host does not wait."""
        if self._copy is not None and self.in_flight:
            self._copy.hold()

    def finished(self) -> bool:
        """Whether the save in flight has ended on all ranks (collective), so that `finish` will not wait."""
        return self._writing is not None and bool(self._ranks.lowest(int(self._writing.finished)))

    def settle(self) -> Saved | None:
        """Wait for the save in flight, and say how it ended on this rank; None if there is none. Not collective."""
        return None if self._writing is None else self._writing.result()

    def finish(self) -> Saved:
        """Wait for the save in flight, and say how it ended (collective)."""
        assert self._writing is not None
        saved, self._writing = self._writing.result(), None
        if not self._ranks.lowest(int(not saved.error)) and not saved.error:
            return replace(saved, error=f"step {saved.step} was not saved to {self._folder}: another rank failed")
        return saved

    def _await_memory(self) -> str:
        if self._allocation is None:
            return ""
        allocation, self._allocation = self._allocation, None
        try:
            self._ranks.together(allocation.result)
        except CheckpointError as error:
            self._copy = None
            return f"training waits until saves are written: there is no host memory for copies ({error})"
        return ""

    def _write(self, saved: Saved, fragments: Sequence[Fragment], state: Mapping[str, Any], prunes: bool) -> Saved:
        started, error, warning = time.perf_counter(), "", ""
        try:
            with self._on_device():
                if self._copy is not None:
                    self._copy.wait()
                save_checkpoint(self._folder, saved.step, fragments, state, self._writers)
            if prunes and self._writers.rank == 0:
                warning = self._prune(saved.path)
        except CheckpointError as failure:
            error = str(failure)
        except Exception as failure:
            error = f"step {saved.step} was not saved to {self._folder}: {self._writers.describe(failure, self._writers.rank)}"
        return replace(saved, error=error, warning=warning, write_seconds=time.perf_counter() - started)

    def _prune(self, saved: Path) -> str:
        try:
            prune(self._folder, self._kept, saved)
        except CheckpointError as error:
            return str(error)
        return ""

    def _on_device(self) -> Any:
        """A thread begins on the first GPU, whatever its rank's is."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
