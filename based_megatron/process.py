"""What a process owes the one that started it: to end with it, and to leave the cause of its failure where it looks."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

CAUSES = "BASED_CAUSES"
"""Variable with the folder in which a launcher looks for what ranks failed of."""
PR_SET_PDEATHSIG = 1
FIRST_WORD_SECONDS = 10.0
"""For so long the other ranks leave it to rank 0 to print a refusal."""


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
    """Leave a rank's file about a failure (run_folder/failures.py) for the launcher, if it wants one."""
    folder = os.environ.get(CAUSES, "")
    if not folder:
        return
    from based_megatron.run_folder.failures import write_failure

    try:
        write_failure(Path(folder), int(rank_name() or "0"), error)
    except OSError as failure:
        print(f"based: the cause could not be left in {folder}: {failure}", file=sys.stderr, flush=True)


def let_rank_0_speak(exit_code: int) -> None:
    """On other ranks: wait to be ended by the launcher, with this exit code and without a word, because rank 0 was refused too.

    Returns if that does not happen: what this rank alone was refused for, it must say itself.
    """
    if rank_name() in ("", "0"):
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
    time.sleep(FIRST_WORD_SECONDS)
    signal.signal(signal.SIGTERM, before)
