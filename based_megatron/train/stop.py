"""A clean stop: any rank may ask for it, all agree at a step boundary."""

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist


class StopVote:
    """Collects SIGTERM, SIGUSR2 and a stop file, and asks the other ranks.

    Made first of all, so that a signal during start-up is not lost. Handlers only set a flag: saving needs collectives, which
    a handler may interrupt.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file, self._reason = stop_file, ""
        self._hosts: dist.ProcessGroup | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name

    def agreed(self) -> str:
        """Why to stop now, or an empty string on all ranks (collective). Hosts vote among themselves: no device is waited for."""
        if dist.get_rank() == 0 and self._stop_file.exists():
            self._reason = self._reason or f"file {self._stop_file.name}"
        if self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        votes = torch.tensor([1 if self._reason else 0])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._hosts)
        return (self._reason or "another rank") if int(votes) else ""

    def clear(self) -> None:
        """Remove the stop file of an earlier stop, so that the next start runs."""
        if dist.get_rank() == 0:
            self._stop_file.unlink(missing_ok=True)
        dist.barrier()
