"""The thread that decodes: clients hand in requests and get their text; nobody else touches the model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from based_megatron.inference.text import TextDecoder, TextRequest, TextUpdate

CLOSED = "error"
"""Why requests end when the decoder fails."""


@dataclass(frozen=True)
class Part:
    """New text of a request, for its client."""

    index: int
    """Which of the client's prompts it continues."""
    text: str
    tokens: int
    finish: str | None


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Job:
    """A prompt of a client, whose parts arrive in its event loop, in one queue for all of its prompts."""

    index: int
    request: TextRequest
    loop: asyncio.AbstractEventLoop
    parts: asyncio.Queue[Part]

    def tell(self, text: str, tokens: int, finish: str | None) -> None:
        """Hand on new text, from the decoding thread."""
        # The loop of a server that ends is closed: nobody waits.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.parts.put_nowait, Part(self.index, text, tokens, finish))


@dataclass
class Counts:
    """What /metrics says, since the start."""

    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """By why they ended; `cancelled` where the client went away."""
    refused: dict[int, int] = field(default_factory=dict)
    """By HTTP status."""


def count(counts: dict[Any, int], key: object) -> None:
    """One more of a kind."""
    counts[key] = counts.get(key, 0) + 1


class Worker:
    """Decodes in a thread of its own. The methods may be called from any thread."""

    def __init__(self, decoder: TextDecoder, most_waiting: int) -> None:
        self.decoder, self.most_waiting, self.counts = decoder, most_waiting, Counts()
        self.failure: BaseException | None = None
        self._condition = threading.Condition()
        self._new: deque[Job] = deque()
        self._cancelled: list[Job] = []
        self._numbers: dict[Job, int] = {}
        self._jobs: dict[int, Job] = {}
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its round."""
        with self._condition:
            self._ends = True
            self._condition.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are decoded."""
        return self._thread.is_alive() and self.failure is None

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._new) + self.decoder.batcher.waiting

    @property
    def running(self) -> int:
        """Requests that are decoded."""
        return self.decoder.batcher.running

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of these, or none. Raises QueueFull."""
        with self._condition:
            if self.waiting + len(jobs) > self.most_waiting:
                raise QueueFull
            self._new.extend(jobs)
            self.counts.requests += len(jobs)
            self._condition.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Free the slots of prompts, or their places in the queue. One that has ended is no error."""
        with self._condition:
            self._cancelled += jobs
            self._condition.notify()

    def _run(self) -> None:
        try:
            if self.decoder.device.type == "cuda":
                torch.cuda.set_device(self.decoder.device)  # a thread begins on the first one
            while self._exchange():
                for update in self.decoder.step():
                    self._hand_on(update)
        except BaseException as failure:  # whatever it was: clients must not wait for it
            self.failure = failure
            for job in [*self._jobs.values(), *self._new]:
                job.tell("", 0, CLOSED)
            logging.getLogger(__name__).exception("the decoder has failed; nothing more is served")

    def _exchange(self) -> bool:
        """Take what clients have asked for meanwhile, and wait for something to do. Whether to go on."""
        with self._condition:
            while not (self._ends or self._new or self._cancelled or self.decoder.batcher.is_busy):
                self._condition.wait()
            for job in self._cancelled:
                self._drop(job)
            self._cancelled.clear()
            while self._new:
                job = self._new.popleft()
                number = self.decoder.add(job.request)
                self._numbers[job], self._jobs[number] = number, job
            return not self._ends

    def _drop(self, job: Job) -> None:
        if job in self._new:
            self._new.remove(job)
        elif job in self._numbers:
            number = self._numbers.pop(job)
            self.decoder.cancel(number)
            del self._jobs[number]
        else:
            return
        count(self.counts.finished, "cancelled")

    def _hand_on(self, update: TextUpdate) -> None:
        job = self._jobs[update.request]
        if update.finish is not None:
            del self._jobs[update.request], self._numbers[job]
            count(self.counts.finished, update.finish)
        if update.text or update.tokens or update.finish:
            job.tell(update.text, update.tokens, update.finish)
