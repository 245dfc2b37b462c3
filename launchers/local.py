"""A run on this machine: torchrun starts all ranks."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType

import psutil

from based_megatron.config.limits import check_limits, flag
from based_megatron.config.schema import Count
from based_megatron.launchers import agent
from based_megatron.process import end_with

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class LocalOptions:
    """Start the ranks on this machine: one process for each GPU, or several on a CPU."""

    nproc: Count
    """Number of ranks to start."""
    dry_run: bool = False
    """Print the command and do not run it."""


def launch_local(options: LocalOptions, command: Sequence[str]) -> int:
    """Run a `based` command on `nproc` ranks, once; returns its exit code.

    The first Ctrl-C, SIGTERM, SIGHUP or SIGUSR2 asks every rank to stop cleanly, the second kills them.
    """
    check_limits(options, flag)
    line = torchrun_command(options.nproc, command)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // options.nproc))
    if options.dry_run:
        print(f"OMP_NUM_THREADS={threads} {shlex.join(line)}")
        return 0
    # In a session of its own: otherwise the terminal's Ctrl-C would reach torchrun too, which gives ranks 30 seconds to save.
    agent = subprocess.Popen(
        line,
        env=os.environ | {"OMP_NUM_THREADS": threads},
        start_new_session=True,
        # Ranks end with the agent (process.py), so none goes on training when this process is killed.
        preexec_fn=partial(end_with, os.getpid()),
    )
    restore = {number: signal.signal(number, _Stop(agent.pid)) for number in STOP_SIGNALS}
    try:
        status = agent.wait()
    finally:
        for number, handler in restore.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def torchrun_command(nproc: int, command: Sequence[str]) -> list[str]:
    """The command line that starts the ranks."""
    torchrun = [sys.executable, "-P", agent.__file__, "--standalone", "--local-addr=127.0.0.1"]
    return [*torchrun, f"--nproc-per-node={nproc}", "-m", "based_megatron", *command]


class _Stop:
    """Handler of the stop signals. It signals the ranks directly, because torchrun would kill a rank that takes long to save."""

    def __init__(self, agent_pid: int) -> None:
        self._agent_pid = agent_pid
        self._asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        agent = psutil.Process(self._agent_pid)
        ranks = agent.children()
        if self._asked or not ranks:
            _send(signal.SIGKILL, [*agent.children(recursive=True), agent])
        else:
            _send(signal.SIGTERM, ranks)
        self._asked = True


def _send(number: signal.Signals, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
