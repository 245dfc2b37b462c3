"""What a process owes the one that started it: to end with it, and to leave the cause of its failure where it looks."""

import ctypes
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

from based_megatron.errors import BasedError

CAUSES = "BASED_CAUSES"
"""Variable with the folder in which a launcher looks for causes of failure."""
PR_SET_PDEATHSIG = 1
AFTERMATH = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed ?out|remote process|communicator was aborted|terminated",
    re.IGNORECASE,
)
"""What an error says if it comes of the failure of another rank."""


def end_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux). Kills it now if the parent is gone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_torchrun() -> None:
    """Have the kernel kill this rank when the torchrun agent that started it ends. Other starters look after their ranks."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent_pid = os.getppid()
    end_with(agent_pid)
    # If the agent ended before we looked, another process has adopted us; no init is a Python program.
    if not os.path.basename(os.readlink(f"/proc/{agent_pid}/exe")).startswith("python"):
        os.kill(os.getpid(), signal.SIGKILL)


def rank_name() -> str:
    """The number of this rank as its launcher says it, or an empty string outside of a launcher."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", ""))


def leave_cause(error: BaseException) -> None:
    """Leave one line about a failure for the launcher, if it wants one: `PRIORITY SECONDS STATUS rank R on HOST: TYPE: MESSAGE`.

    Sorted as numbers, the first line is the cause of all others: priority 1 is the aftermath of another rank's failure.
    Status 2 means that a new start would fail the same way.
    """
    folder, rank = os.environ.get(CAUSES, ""), rank_name() or "0"
    if not folder:
        return
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    final = isinstance(error, BasedError) and not error.may_pass
    priority = 0 if final or not AFTERMATH.search(message) else 1
    line = f"{priority} {time.time():.3f} {2 if final else 1} rank {rank} on {socket.gethostname()}: {message:.500}\n"
    try:
        (Path(folder) / f"cause-{int(rank):04d}").write_text(line)
    except OSError as failure:
        print(f"based: the cause could not be left in {folder}: {failure}", file=sys.stderr, flush=True)
