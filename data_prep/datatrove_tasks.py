"""datatrove's executors as engines of `based prep`: processes of this machine, SLURM arrays, a Ray cluster. The only door to datatrove.

    JOBS/work.pickle        the work and the list of its jobs, which every rank reads from a file system that all nodes see
    JOBS/results/NUMBER     the result of a job, or its error, with what it has passed; a rank does those of its jobs that have none
    JOBS/datatrove/         the executor's logs and statistics

The jobs are those of the local engine, and so are the bytes that they write.
"""

import contextlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from based_megatron.data_prep.tasks import Job, Result, Tell, Work
from based_megatron.errors import BasedError, ConfigError, DataError
from based_megatron.run_folder.whole_file import whole_file

try:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.executor.ray import RayPipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from loguru import logger as datatrove_logger
except ImportError as error:
    raise ConfigError(
        f"--executor local is the only one without datatrove ({error}): pip install 'based-megatron[prep]'"
    ) from error

POLL_SECONDS = 1.0
GONE_POLLS = 5
"""Times in a row that SLURM must not know the array, before what has no result then is submitted again."""
MAX_ARRAY = 1001
"""Ranks of one array: what a SLURM that nobody has configured allows."""


Execute = Callable[[Path, int, Path], "Array | None"]
"""Starts so many ranks on the jobs of a folder, with another folder for logs. What comes back says when they are gone; None: they are."""


@dataclass(frozen=True)
class SlurmResources:
    """What the ranks of an array ask SLURM for."""

    time: str
    partition: str
    memory_gb: int
    options: tuple[str, ...]
    """More options of sbatch, as `account=x`."""


class JobsOfRank(PipelineStep):  # type: ignore[misc]
    """The step of the pipeline: every so-manieth job, from the number of the rank on."""

    name = "based prep"
    type = "jobs"

    def __init__(self, folder: str):
        """folder: that of a list of jobs."""
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do the jobs of a rank that have no result yet."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = Path(self.folder)
        work, jobs = pickle.loads((folder / "work.pickle").read_bytes())
        for number in range(rank, len(jobs), world_size):
            if not _result_path(folder, number).exists():
                _do(work, jobs[number], _result_path(folder, number))
        return data


class DatatroveTasks:
    """An engine whose processes an executor of datatrove starts."""

    def __init__(self, count: int, folder: Path, execute: Execute):
        """folder: where lists of jobs are kept while they run."""
        self.count, self._folder, self._execute = count, folder, execute

    def run(self, work: Work[Job, Result], jobs: Sequence[Job], tell: Tell) -> Iterator[Result]:
        """The results of all jobs, as they are finished. Raises what a job raises, and DataError if ranks do not finish."""
        if not jobs:
            return
        folder = self._folder / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        (folder / "results").mkdir(parents=True)
        with whole_file(folder / "work.pickle", binary=True) as stream:
            pickle.dump((work, list(jobs)), stream)
        left = set(range(len(jobs)))
        while left:
            before = len(left)
            array = self._execute(folder, min(self.count, len(jobs)), folder / "datatrove")
            try:
                while left:
                    found = [number for number in sorted(left) if _result_path(folder, number).exists()]
                    for number in found:
                        left.remove(number)
                        yield _taken(_result_path(folder, number), tell)
                    if not found and (array is None or array.is_gone()):
                        break
                    time.sleep(POLL_SECONDS if left and not found else 0)
            finally:
                if array is not None and left:
                    array.cancel()
            if len(left) == before:
                raise DataError(
                    f"{len(left)} of {len(jobs)} jobs did not finish, and no task says why: see {folder / 'datatrove'}; "
                    f"start again to go on"
                )
            shutil.rmtree(folder / "datatrove" / "completions", ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> "DatatroveTasks":
        shutil.rmtree(self._folder, ignore_errors=True)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # logs of a failure are in it
            self._folder.rmdir()


def run_here(folder: Path, tasks: int, logs: Path) -> None:
    """Do the jobs of a folder in processes of this machine, and wait for them."""
    datatrove_logger.disable("datatrove")
    with _environment(LOGURU_LEVEL="ERROR"):  # of the processes that it starts
        LocalPipelineExecutor([JobsOfRank(str(folder))], tasks=tasks, logging_dir=str(logs)).run()


def run_on_ray(folder: Path, tasks: int, logs: Path) -> None:
    """Do the jobs of a folder on a Ray cluster, that of RAY_ADDRESS or one of this machine, and wait for them."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--executor ray needs Ray ({error}): pip install 'ray[default]'") from error
    datatrove_logger.disable("datatrove")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    RayPipelineExecutor([JobsOfRank(str(folder))], tasks=tasks, logging_dir=str(logs), mem_per_cpu_gb=1).run()


@dataclass(frozen=True)
class Array:
    """Arrays of SLURM jobs of one name."""

    name: str

    def is_gone(self) -> bool:
        """Whether none of them has waited or run for some time."""
        for _ in range(GONE_POLLS):
            words = ["squeue", "--noheader", "--me", f"--name={self.name}"]
            found = subprocess.run(words, capture_output=True, text=True)
            # A controller that does not answer says nothing about the jobs.
            if found.returncode or found.stdout.strip():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def cancel(self) -> None:
        """End them."""
        subprocess.run(["scancel", "--me", f"--name={self.name}"], capture_output=True)


class _Executor(SlurmPipelineExecutor):  # type: ignore[misc]
    """An executor that submits its array and nothing else."""

    def launch_merge_stats(self) -> None:
        """Leave out the job that sums up statistics: after a failure it would wait for ever, under the name of the array."""


def submit_to_slurm(name: str, resources: SlurmResources) -> Execute:
    """What submits arrays of this name. Those of a former start that are still there are ended."""

    def submit(folder: Path, tasks: int, logs: Path) -> Array:
        datatrove_logger.disable("datatrove")
        array = Array(name)
        array.cancel()
        options = dict(option.partition("=")[::2] for option in resources.options)
        executor = _Executor(
            [JobsOfRank(str(folder))],
            tasks=tasks,
            time=resources.time,
            partition=resources.partition or _default_partition(),
            mem_per_cpu_gb=resources.memory_gb,
            job_name=name,
            qos="",
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
            sbatch_args={"open-mode": "append", **options},
            max_array_size=MAX_ARRAY,
            max_array_launch_parallel=True,
            logging_dir=str(logs),
            requeue_signals=None,
        )
        # sbatch would take what SLURM says of the job that this process is in for its options.
        with _environment(**dict.fromkeys(_names_of_the_job())):
            try:
                executor.run()
            except (OSError, subprocess.CalledProcessError) as error:
                raise ConfigError(f"sbatch refuses the tasks: {error}; see --slurm-options") from error
        return array

    return submit


def _default_partition() -> str:
    """The partition of jobs that name none; datatrove always names one."""
    found = subprocess.run(["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True).stdout.split()
    return next((name.removesuffix("*") for name in found if name.endswith("*")), "")


def _names_of_the_job() -> list[str]:
    return [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """An environment with these values, and without those that are None."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _do(work: Any, job: Any, path: Path) -> None:
    """Do a job, and leave its result or its error."""
    passed = [0, 0]

    def tell(passed_bytes: int, tokens: int) -> None:
        passed[0] += passed_bytes
        passed[1] += tokens

    outcome: tuple[Any, Exception | None]
    try:
        outcome = work(job, tell), None
    except (BasedError, OSError) as error:
        outcome = None, error
    with whole_file(path, binary=True) as stream:
        pickle.dump((outcome, tuple(passed)), stream)


def _taken(path: Path, tell: Tell) -> Any:
    """The result in a file. Raises the error in it."""
    (result, error), passed = pickle.loads(path.read_bytes())
    if error is not None:
        raise error
    tell(*passed)
    return result


def _result_path(folder: Path, number: int) -> Path:
    return folder / "results" / str(number)
