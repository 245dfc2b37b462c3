"""A clean stop: any rank may ask for it, all agree at a step boundary."""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist

from based_megatron.errors import DataError
from based_megatron.run_folder.files import PAUSE, STOPPED
from based_megatron.train.signals import StopSignals


class StopVote:
    """Collects stop signals, a stop file and the launcher's pause file, and asks the other ranks.

    A stop file counts whenever it was made, before the start too. The run renames it when it has ended, so the next start runs.
    By the pause file the script of a SLURM job asks the ranks to leave its nodes; the run goes on in the next job.
    """

    def __init__(self, stop_file: Path, signals: StopSignals | None = None) -> None:
        self._stop_file, self._pause_file = stop_file, stop_file.with_name(PAUSE)
        self._stopped_file = stop_file.with_name(STOPPED)
        self._signals = signals or StopSignals()
        self._hosts: dist.ProcessGroup | None = None

    def agreed(self, failure: str = "") -> str:
        """Why to stop now, or an empty string on all ranks (collective). Hosts vote among themselves: no device is waited for.

        failure: why this rank cannot take the next step. Raises DataError on all ranks if any cannot: nobody waits for it.
        """
        reason = self._file() or self._signals.received
        if self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        votes = torch.tensor([2 if failure else 1 if reason else 0])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._hosts)
        if int(votes) == 2:
            failures = [""] * dist.get_world_size(self._hosts)
            dist.all_gather_object(failures, failure, group=self._hosts)
            raise DataError(next(filter(None, failures)))
        return (reason or "another rank") if int(votes) else ""

    def forget_last(self) -> None:
        """Remove the trace of an earlier stop: this start is a new one."""
        if dist.get_rank() == 0:
            self._stopped_file.unlink(missing_ok=True)

    def honoured(self) -> None:
        """Rename the stop file: the run has ended cleanly, and the file shall not stop the next start."""
        if dist.get_rank() == 0:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._stop_file, self._stopped_file)

    def _file(self) -> str:
        if dist.get_rank() == 0:
            for path in (self._stop_file, self._pause_file):
                if path.exists():
                    return f"file {path.name}"
        return ""
