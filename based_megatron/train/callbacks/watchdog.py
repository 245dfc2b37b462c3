"""A thread on each rank that notices when the rank makes no progress, and writes down where it is."""

from __future__ import annotations

import faulthandler
import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from based_megatron.monitor import flight_recorder
from based_megatron.monitor.events import append_event
from based_megatron.monitor.hangs import Stuck, explain, limit_seconds, read_stuck, write_stuck
from based_megatron.monitor.progress import Beat
from based_megatron.run_folder.failures import STOOD_STILL
from based_megatron.run_folder.files import EVENTS, HEARTBEAT, STACKS
from based_megatron.run_folder.whole_file import whole_file
from based_megatron.train.callbacks.base import Callback

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer

TICK_SECONDS = 1.0
STANDSTILL_SECONDS = 10.0
"""A thread that wants to run once a tick, and does not for so long, is one of a process that was stopped, or of a host that stood still."""
RECENT_SECONDS = 60.0
"""A standstill that ended so long ago has nothing to do with an error now."""
STDERR = 2


class Watchdog(Callback):
    """Watches the progress of this rank from a thread, which goes on while the main thread is stuck in a call.

    A rank without progress for longer than its limit writes run_dir/stacks/rank-NNNNN.txt (monitor/hangs.py) and the records of
    the flight recorder next to it. A while later, the lowest rank that has written says in events.jsonl whom the others wait for.

    The logging rank keeps run_dir/heartbeat: one line `{"step": int, "phase": str, "limit_seconds": int, "time": ISO}`, written anew
    (and renamed) when its progress moves, at most once a tick. A launcher may end the ranks if the file does not change for
    `limit_seconds`: by then the stacks are there.
    """

    def __init__(self, hosts: Sequence[str], hang_seconds: float = 0.0) -> None:
        """hosts: of each rank. hang_seconds: the limit; 0 makes it of measured times."""
        self._hosts, self._hang_seconds = hosts, hang_seconds
        self._ended = threading.Event()
        self._ticked = time.monotonic()
        self._standstill = (0.0, -math.inf)
        """The last one: its seconds, and when it ended."""
        self._thread: threading.Thread | None = None
        self._beat: Beat | None = None
        """The last one that was written to the heartbeat."""
        self._stuck: tuple[Beat, float] | None = None
        """The beat whose stacks were written, and when all of them are read."""

    def on_start(self, trainer: Trainer) -> None:
        self._run_dir, self._rank = trainer.run_dir, trainer.topology.rank
        self._progress = trainer.clock.progress
        self._began = time.time()
        self._ticked = time.monotonic()
        self._write_heartbeat()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def on_end(self, trainer: Trainer) -> None:
        self._stop()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._tick()
        seconds, ended = self._standstill
        if time.monotonic() - ended < RECENT_SECONDS:
            error.add_note(f"{STOOD_STILL} {seconds:.0f} s: it was stopped, or its host stood still")
        self._stop()

    def look(self) -> None:
        """Do what is due now."""
        beat, limit = self._progress.beat, limit_seconds(self._progress, self._hang_seconds)
        if beat is not self._beat:
            self._write_heartbeat()
        now = time.monotonic()
        if self._stuck is not None and beat is self._stuck[0]:
            if now >= self._stuck[1]:
                self._stuck = (beat, math.inf)
                self._tell_all()
        elif now - beat.since > limit:
            self._stuck = (beat, now + grace_seconds(limit))
            self._write_stacks(beat)

    def _watch(self) -> None:
        while not self._ended.wait(min(TICK_SECONDS, self._hang_seconds / 10 or TICK_SECONDS)):
            # Only fires if this thread does not run either: the main thread holds the interpreter.
            self._tick()
            limit = limit_seconds(self._progress, self._hang_seconds)
            faulthandler.dump_traceback_later(2 * limit + TICK_SECONDS, file=STDERR)
            try:
                self.look()
            except OSError as error:
                print(f"rank {self._rank}: the watchdog could not write: {error}", file=sys.stderr, flush=True)
        faulthandler.cancel_dump_traceback_later()

    def _tick(self) -> None:
        before, self._ticked = self._ticked, time.monotonic()
        if self._ticked - before > STANDSTILL_SECONDS:
            self._standstill = (self._ticked - before, self._ticked)

    def _stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(TICK_SECONDS)

    def _write_heartbeat(self) -> None:
        if self._rank:
            return
        self._beat = beat = self._progress.beat
        limit = limit_seconds(self._progress, self._hang_seconds)
        content = {
            "step": beat.step,
            "phase": beat.phase,
            "limit_seconds": math.ceil(limit + 2 * grace_seconds(limit)),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with whole_file(self._run_dir / HEARTBEAT) as stream:
            stream.write(json.dumps(content) + "\n")

    def _write_stacks(self, beat: Beat) -> None:
        folder = self._run_dir / STACKS
        # First without the recorder: it may have to wait for the library that hangs.
        write_stuck(folder, self._rank, beat, {})
        if collectives := flight_recorder.write_records(folder, self._rank):
            write_stuck(folder, self._rank, beat, collectives)

    def _tell_all(self) -> None:
        """Record the hang, if no lower rank does."""
        found = self._others()
        if found and found[0].rank == self._rank:
            hang = explain(found, self._hosts)
            step = max(stuck.step for stuck in found)
            fields = {"message": hang.message, "behind": hang.behind, "hosts": hang.hosts, "stacks": STACKS}
            append_event(self._run_dir / EVENTS, {"time": time.time(), "step": step, "event": "hang", **fields})
            print(
                f"rank {self._rank}: no progress: {hang.message}; see {self._run_dir / STACKS}",
                file=sys.stderr,
                flush=True,
            )

    def _others(self) -> list[Stuck]:
        """What ranks have written about this hang."""
        mine, _ = self._stuck or (self._progress.beat, 0.0)
        since = time.time() - (time.monotonic() - mine.since)
        return read_stuck(Path(self._run_dir) / STACKS, max(self._began, since))


def grace_seconds(limit: float) -> float:
    """Seconds that other ranks get to notice the same hang, and to write their stacks."""
    return max(2.0, min(30.0, limit / 4))
