"""A sweep over points of the study: worker processes train them, and every finished run is a line of a file.

A run is one point with one seed, at all rates. What is in the file is not run again, so that a sweep which was killed goes on with the
next start, and first with the runs that it was in the middle of, after their last epoch. A run that fails or takes its worker down is
reported, costs no other run, and is tried again by the next start.
"""

import hashlib
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from based_megatron.model.mixers import layer_mixers
from based_megatron.recall.mqar import Task
from based_megatron.recall.presets import Preset
from based_megatron.recall.progress import Progress
from based_megatron.recall.systems import Point, state_bytes
from based_megatron.recall.train import mean
from based_megatron.recall.worker import Job, Setup, serve
from based_megatron.run_folder.json_lines import append_line, read_lines
from based_megatron.run_folder.lock import RunLock, held

RESULTS, UNFINISHED = "results.jsonl", "unfinished"
LOCK_SECONDS = 60
POLL_SECONDS = 1.0
PRELOAD = ["based_megatron.recall.worker"]
"""Imported once by the server that workers are forked from, on a CPU."""


def study_key(preset: Preset) -> str:
    """What runs have in common that can be compared: the task and the recipe."""
    return _hash(asdict(preset))


def jobs_of(points: Sequence[Point], preset: Preset, seeds: int) -> list[Job]:
    """All points with the first seed, then all with the second, and so on."""
    study = study_key(preset)
    return [
        Job(point, seed, _hash({"study": study, "point": asdict(point), "seed": seed}))
        for seed in range(seeds)
        for point in points
    ]


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def locked(folder: Path) -> AbstractContextManager[RunLock]:
    """The folder for one sweep alone. Raises ConfigError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    advice = "wait for it, or set --output to another folder"
    return held(folder, LOCK_SECONDS, lambda line: print(line, flush=True), advice)


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of a folder by key; the last line of a key counts, and runs that have failed since are not among them."""
    lines = {line["key"]: line for line in read_lines(folder / RESULTS) if "key" in line} if _has(folder) else {}
    return {key: line for key, line in lines.items() if "failed" not in line}


def _has(folder: Path) -> bool:
    return (folder / RESULTS).is_file()


@dataclass
class Sweep:
    """The jobs of one start."""

    folder: Path
    setup: Setup
    workers: int
    jobs: list[Job]
    failures: list[str] = field(default_factory=list)
    """Runs that failed, each with its reason."""
    unfinished: int = 0
    """Runs that are left for the next start."""

    def run(self) -> None:
        """Run what is not in the folder's results yet."""
        done = finished(self.folder)
        waiting = [job for job in self.jobs if job.key not in done]
        waiting.sort(key=lambda job: not self._progress(job).is_begun)
        self._count, self._total = len(self.jobs) - len(waiting), len(self.jobs)
        # What workers import may ask for the GPU, and a process that has done so cannot be forked.
        on_cpu = all(device == "cpu" for device in self.setup.devices)
        context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
        if on_cpu:
            context.set_forkserver_preload(PRELOAD)
        workers: list[Worker] = []
        try:
            while True:
                idle = [worker for worker in workers if worker.job is None]
                while (job := self._next(waiting)) is not None and (idle or len(workers) < self.workers):
                    if not idle:
                        workers.append(Worker(context, self.setup, self._freest_device(workers)))
                        idle.append(workers[-1])
                    idle.pop().give(job)
                    waiting.remove(job)
                busy = [worker for worker in workers if worker.job is not None]
                if not busy:
                    break
                for worker in Worker.that_answered(busy):
                    self._take(worker)
                workers = [worker for worker in workers if worker.alive]
        finally:
            for worker in workers:
                worker.end()
        self.unfinished += len(waiting)

    def _freest_device(self, workers: Sequence["Worker"]) -> str:
        taken = Counter(worker.device for worker in workers)
        return min(self.setup.devices, key=lambda device: taken[device])

    def _next(self, waiting: Sequence[Job]) -> Job | None:
        """The first job, as long as there is time: what it does not end is kept for the next start."""
        is_over = time.time() > (self.setup.deadline or math.inf)
        return None if is_over or not waiting else waiting[0]

    def _progress(self, job: Job) -> Progress:
        return Progress(self.folder / UNFINISHED, job.key)

    def _take(self, worker: "Worker") -> None:
        job, answer = worker.answer()
        point = job.point
        if answer is None:
            self.unfinished += 1
            return
        line = {
            "key": job.key,
            "study": study_key(self.setup.preset),
            "system": point.system,
            "point": point.name,
            "seed": job.seed,
        }
        append_line(self.folder / RESULTS, {**line, **answer}, durable=True)
        self._count += 1
        if "failed" in answer:
            self.failures.append(f"{point.name} seed {job.seed}: {answer['failed']}")
            print(f"{point.name:24} seed {job.seed}: FAILED: {answer['failed']}", flush=True)
            return
        self._progress(job).remove()
        best = best_rate(answer)
        shown = " ".join(f"{name} {value:.3f}" for name, value in best["accuracy"].items())
        print(
            f"{self._count:3}/{self._total} {point.name:24} {mean(best['accuracy']):.3f}  {answer['state_bytes']['published']:>9,} bytes  "
            f"rate {best['rate']:.2g}  {answer['seconds']:.0f} s  ({shown})",
            flush=True,
        )


def best_rate(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rate with the highest mean accuracy of a finished run."""
    tested = [rate for rate in line["rates"] if rate["accuracy"]]
    return max(tested, key=lambda rate: mean(rate["accuracy"]))


class Worker:
    """A process that runs one job at a time."""

    def __init__(self, context: Any, setup: Setup, device: str) -> None:
        self.device = device
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, setup, device), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.alive = True

    def give(self, job: Job) -> None:
        """Start a job."""
        self.job = job
        self.pipe.send(job)

    @staticmethod
    def that_answered(workers: Iterable["Worker"]) -> list["Worker"]:
        """Workers with an answer, or dead; waits for a while until there is one."""
        by_pipe: dict[Any, Worker] = {worker.pipe: worker for worker in workers}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe), POLL_SECONDS)]

    def answer(self) -> tuple[Job, dict[str, Any] | None]:
        """The job and its result; None if the time was over. A death is a failure of the job."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.alive = False
            return job, {"failed": f"its worker died (exit code {self.process.exitcode})"}

    def end(self) -> None:
        """End the process."""
        self.process.kill()


def check(points: Sequence[Point], task: Task) -> None:
    """Raise ConfigError for a task without examples, and for models that cannot be built, before anything is trained."""
    task.check()
    for point in points:
        for mixer in layer_mixers(point.model):
            mixer.check(point.model, tensor=1)
        state_bytes(point.model, task.longest_tokens)
