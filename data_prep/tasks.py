"""Processes of this machine that work on one list of jobs: the local engine of `based prep`.

A process that ends without an answer, as one does that the system kills for memory, ends the list with an error: nothing waits for it.
Processes end with the one that started them, however that ends.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol, TypeVar

from based_megatron.errors import BasedError, DataError
from based_megatron.process import end_with

Tell = Callable[[int, int], None]
"""Takes the bytes and the tokens that a job has passed since it last called."""
Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)
SINGLE_THREAD = "TOKENIZERS_PARALLELISM"
"""What the library of tokenizers asks for before it starts threads of its own."""


class Work(Protocol[Job, Result]):
    """What is done with every job of a list. It can be pickled, and keeps between jobs what they share."""

    def __call__(self, job: Job, tell: Tell, /) -> Result:
        """Do a job. Raises BasedError, OSError."""


class Engine(Protocol):
    """What does jobs: a context, which ends what it has started."""

    count: int
    """Tasks at a time."""

    def run(self, work: Work[Job, Result], jobs: Sequence[Job], tell: Tell) -> Iterator[Result]:
        """The results of all jobs, in the order in which they are finished. Raises what a job raises, and DataError if tasks die."""
        ...

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *error: object) -> None: ...


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tasks:
    """So many processes; they start with the first list that needs them, and serve all lists."""

    def __init__(self, tasks: int):
        """tasks: 0 for one a core."""
        self.count = tasks or usable_cores()
        self._processes: list[_Process] = []

    def run(self, work: Work[Job, Result], jobs: Sequence[Job], tell: Tell) -> Iterator[Result]:
        """The results of all jobs, in the order in which they are finished. Raises what a job raises, and DataError if a process dies."""
        if min(self.count, len(jobs)) <= 1:
            yield from self._run_here(work, jobs, tell)
            return
        while len(self._processes) < min(self.count, len(jobs)):
            self._processes.append(_Process())
        left = iter(jobs)
        busy: dict[Any, _Process] = {}
        for process, job in zip(self._processes, left, strict=False):  # a process for each of the first jobs
            process.give(work, job)
            busy[process.pipe] = process
        while busy:
            for pipe in wait(list(busy)):
                answer = busy[pipe].answer()
                if isinstance(answer, _Progress):
                    tell(*answer)
                    continue
                process = busy.pop(pipe)
                if (job := next(left, _NO_JOB)) is not _NO_JOB:
                    process.give(work, job)
                    busy[pipe] = process
                yield answer.result

    def _run_here(self, work: Work[Job, Result], jobs: Sequence[Job], tell: Tell) -> Iterator[Result]:
        with _single_thread() if self.count == 1 else contextlib.nullcontext():
            for job in jobs:
                yield work(job, tell)

    def __enter__(self) -> "Tasks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.end()


class _Progress(NamedTuple):
    bytes: int
    tokens: int


class _Answer(NamedTuple):
    result: Any


class _Failure(NamedTuple):
    error: Exception


_NO_JOB: Any = object()


class _Process:
    """A process that does one job at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        self._work: Any = None

    def give(self, work: Any, job: Any) -> None:
        """Start a job."""
        new_work = None if work is self._work else work
        self._work = work
        with contextlib.suppress(BrokenPipeError):  # its answer says that it is dead
            self.pipe.send((new_work, job))

    def answer(self) -> _Progress | _Answer:
        """What it says next. Raises what its job has raised, and DataError if it is dead."""
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise DataError(
                f"a task has died (exit code {self._process.exitcode}; -9 is most often the system's lack of memory): "
                f"start again to go on, with fewer --tasks if so"
            ) from None
        if isinstance(said, _Failure):
            raise said.error
        return said

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, parent_pid: int) -> None:
    """The life of a process."""
    end_with(parent_pid)
    os.environ[SINGLE_THREAD] = "false"
    work: Any = None
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            new_work, job = pipe.recv()
            work = new_work or work
            try:
                pipe.send(_Answer(work(job, lambda *passed: pipe.send(_Progress(*passed)))))
            except (BasedError, OSError) as error:
                pipe.send(_Failure(error))


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    before = os.environ.get(SINGLE_THREAD)
    os.environ[SINGLE_THREAD] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SINGLE_THREAD]
        else:
            os.environ[SINGLE_THREAD] = before
