"""The lock of a run folder: one job at a time writes in it.

The lock is a file that says who owns it; its owner touches it at every beat. It is left behind only by an owner that was killed, and
the next start takes it over:

    at once                  on the same machine, if the process is gone; in a later start of the same SLURM job (a requeue), or in
                             the job that it has submitted to go on in its place
    after `stale_seconds`    elsewhere, if the file has not been touched all the while. Only changes count, not times: clocks differ

Whoever finds an owner that lives is refused.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from based_megatron.errors import ConfigError
from based_megatron.run_folder.files import LOCK

BEATS = 6
"""Times that an owner touches its lock until it would be stale."""
POLL_SECONDS = 1.0
FORMER_JOB = "BASED_FORMER_JOB"
"""Environment variable: the SLURM job whose ranks have ended and that has submitted this one."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    start: int
    """When the process began, in clock ticks of its machine: another process may get its number later."""
    processes: str
    """What the number of a process is unique in: a boot of a machine, and a namespace of processes in it. Empty if unknown."""
    job: str | None
    """Number of its SLURM job."""
    restarts: int
    """Times that SLURM has requeued the job before."""
    time: str
    """When it took the lock: UTC, in ISO format."""
    stale_seconds: int
    """The lock is stale if it is not touched for so long."""

    def __str__(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.time}"


def this_process(stale_seconds: int, environment: Mapping[str, str] = os.environ) -> Owner:
    """This process as an owner."""
    started = process_start(os.getpid())
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        start=started or 0,
        processes=_process_space(),
        job=environment.get("SLURM_JOB_ID"),
        restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        stale_seconds=stale_seconds,
    )


def read_owner(run_dir: Path) -> Owner | None:
    """Who holds the lock of a run folder; None if nobody does, or if the file does not say."""
    try:
        return _owner((run_dir / LOCK).read_bytes())
    except OSError:
        return None


def check_free(run_dir: Path) -> None:
    """Raise ConfigError if the lock of a run folder is held by a process of this machine."""
    owner = read_owner(run_dir)
    if owner is not None and _is_here(owner) and not is_gone(owner):
        raise _in_use(run_dir, owner)


def is_gone(owner: Owner) -> bool:
    """Whether a process has surely ended: it was one of this machine, and is not there any more."""
    return _is_here(owner) and process_start(owner.pid) != owner.start


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since the boot; None if there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in parentheses, may hold any sign.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


class RunLock:
    """The lock of one run folder, on the one process that is to hold it.

    The file keeps its owner out of doubt even if two starts take over one stale lock at the same moment: the last to put its file
    there is the owner, and the other one learns it at its next beat (`lost`).
    """

    def __init__(self, run_dir: Path, me: Owner, tell: Callable[[str], None], former_job: str | None = None) -> None:
        """tell: takes the line that says for how long this start waits, and why. former_job: the value of FORMER_JOB."""
        self._path, self._me, self._tell, self._former_job = run_dir / LOCK, me, tell, former_job
        self._content = json.dumps(asdict(me), indent=1).encode()
        self._watched: tuple[bytes, int] | None = None
        self._watched_since = 0.0
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="lock")
        self.lost = ""
        """Who has taken the folder from its owner, in words; empty while it is ours."""

    def try_take(self) -> bool:
        """Whether the lock is ours now; if not, it may be stale: ask again. Takes up to a second.

        Raises ConfigError if its owner lives, OSError if the lock cannot be written.
        """
        if self._put():
            self._beats.start()
            return True
        found = self._look()
        if found is None:
            return False
        content, _ = found
        owner = _owner(content)
        if owner is not None and (is_gone(owner) or self._goes_on_from(owner)):
            self._remove(content)
            return False
        waiting_seconds = owner.stale_seconds if owner else self._me.stale_seconds
        if owner is not None and _is_here(owner):
            raise _in_use(self._path.parent, owner)
        if self._watched is None:
            self._watched, self._watched_since = found, time.monotonic()
            self._tell(
                f"{self._path.parent} was last used by {owner or 'an owner that its lock does not name'}: waiting up to "
                f"{waiting_seconds} s to see whether it still is"
            )
        elif found != self._watched:
            raise _in_use(self._path.parent, owner)
        elif time.monotonic() - self._watched_since >= waiting_seconds:
            self._remove(content)
            return False
        time.sleep(POLL_SECONDS)
        return False

    def release(self) -> None:
        """Give the folder free, if it is ours."""
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join(POLL_SECONDS)  # it may wait for a file server
        with contextlib.suppress(OSError):
            if not self.lost and self._path.read_bytes() == self._content:
                self._path.unlink()

    def _goes_on_from(self, owner: Owner) -> bool:
        """Whether the owner was an earlier start of this job, or the job that has submitted it."""
        if owner.job is None:
            return False
        return owner.job == self._former_job or (owner.job == self._me.job and owner.restarts < self._me.restarts)

    def _put(self) -> bool:
        """Make the file, whole or not at all, if there is none."""
        temporary = self._aside("new")
        try:
            temporary.write_bytes(self._content)
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _look(self) -> tuple[bytes, int] | None:
        """Content of the file, and when it was touched; None if it is gone. Opening it makes a network's file system ask its server."""
        try:
            with self._path.open("rb") as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _remove(self, stale: bytes) -> None:
        """Remove the file if it is still this one."""
        aside = self._aside("stale")
        try:
            os.rename(self._path, aside)
            if aside.read_bytes() != stale:  # another start was faster: it is its new lock
                os.link(aside, self._path)
        except (FileNotFoundError, FileExistsError):
            pass
        finally:
            aside.unlink(missing_ok=True)

    def _aside(self, kind: str) -> Path:
        return self._path.with_name(f".{LOCK}.{kind}.{self._me.host}.{self._me.pid}")

    def _beat(self) -> None:
        while not self._ended.wait(self._me.stale_seconds / BEATS):
            # A file server that does not answer now is asked again at the next beat.
            with contextlib.suppress(OSError):
                found = self._look()
                if found is None:
                    self._put()
                elif found[0] == self._content:
                    os.utime(self._path)
                else:
                    self.lost = str(_owner(found[0]) or "another job")
                    return


@contextlib.contextmanager
def held(folder: Path, stale_seconds: int, tell: Callable[[str], None], advice: str) -> Iterator[RunLock]:
    """A folder for this process alone, with its lock.

    Raises ConfigError, which ends in the advice, if another process has the folder; OSError if the lock cannot be written.
    """
    lock = RunLock(folder, this_process(stale_seconds), tell, os.environ.get(FORMER_JOB))
    try:
        while not lock.try_take():
            pass
    except ConfigError as error:
        raise ConfigError(f"{folder} is in use by {read_owner(folder) or 'another process'}: {advice}") from error
    try:
        yield lock
    finally:
        lock.release()


def _in_use(run_dir: Path, owner: Owner | None) -> ConfigError:
    return ConfigError(
        f"{run_dir} is in use by {owner or 'another job'}: stop that first, or give this run another run_dir"
    )


def _owner(content: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _is_here(owner: Owner) -> bool:
    """Whether the owner's number is that of a process which we can look up."""
    return owner.processes != "" and owner.processes == _process_space()


def _process_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
