"""Whole `based train` jobs on a tiny corpus, in forked processes or on the ranks of a pool."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from based_megatron.cli import main
from based_megatron.config import parse_config
from based_megatron.data.sources import Sources
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.monitor.events import read_events
from based_megatron.parallel.topology import build_topology
from based_megatron.train.stop import StopVote
from based_megatron.train.train import train_in_folder
from support.pool import fork_context, keep_what_is_shared, rank_device

TINY = [
    "--config", "tiny", "--model.layer-pattern", "cLSA", "--model.hidden-size", "32", "--model.ffn-hidden-size", "48",
    "--model.vocab-size", "300", "--data.sequence-length-tokens", "64", "--train.micro-batch-sequences", "2",
    "--train.global-batch-sequences", "8", "--train.steps", "8", "--validation.interval-steps", "4", "--validation.sequences", "4",
    "--checkpoint.interval-steps", "2", "--checkpoint.keep-last", "0", "--monitor.log-interval-steps", "1",
    "--monitor.sample-interval-steps", "0",
]  # fmt: skip


def prepare_corpus(folder: Path, documents: int) -> Path:
    """A prepared corpus of short documents, in a folder of the given one."""
    lines = [
        json.dumps({"text": f"document {i}: " + " ".join(f"{j * i % 97}" for j in range(40))}) for i in range(documents)
    ]
    text, output = folder / "text.jsonl", folder / "data"
    text.write_text("\n".join(lines))
    prepare(PrepConfig(inputs=(str(text),), output=str(output), vocab_size=300, validation_fraction=0.1))
    return output


def command(run_dir: Path, data: Path, *overrides: str, nproc: int = 1) -> list[str]:
    """The command line of a job: one process, or `nproc` ranks under `based launch local`."""
    train = ["train", *TINY, "--run-dir", str(run_dir), "--data.path", str(data), *overrides]
    launch = ["launch", "local", "--nproc", str(nproc), "--"] if nproc > 1 else []
    return [sys.executable, "-m", "based_megatron", *launch, *train]


@dataclass
class Job:
    """A `based` command in a process of its own, forked from the server of the pools: that has imported everything."""

    process: BaseProcess
    errors: Path
    """Its stderr; what it prints is beside it."""

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    @property
    def stdout(self) -> str:
        return self.errors.with_name("stdout").read_text()

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that killed it, or None while it runs."""
        return self.process.exitcode

    def wait(self, timeout_seconds: float) -> None:
        """Wait for the end, and kill a process that does not end."""
        self.process.join(timeout_seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"the job did not end in {timeout_seconds:.0f} s: {self.stderr}")


def run_job(run_dir: Path, data: Path, *overrides: str, **options: Any) -> Job:
    """Run a job of one process to its end."""
    job = start_job(run_dir, data, *overrides, **options)
    job.wait(timeout_seconds=240)
    return job


def start_job(run_dir: Path, data: Path, *overrides: str, before: Callable[[], None] | None = None) -> Job:
    """Start a job of one process, to be disturbed. The process calls `before` first."""
    return start_command(command(run_dir, data, *overrides)[3:], run_dir / "stderr", before)


def start_command(arguments: list[str], errors: Path, before: Callable[[], None] | None = None) -> Job:
    """Start a `based` command with these arguments."""
    errors.parent.mkdir(parents=True, exist_ok=True)
    process = fork_context().Process(target=_based, args=(arguments, errors, before))
    process.start()
    return Job(process, errors)


def _based(arguments: list[str], errors: Path, before: Callable[[], None] | None) -> None:
    for stream, path in ((sys.stdout, errors.with_name("stdout")), (sys.stderr, errors)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    keep_what_is_shared()
    torch.set_num_threads(1)
    if before:
        before()
    sys.exit(main(arguments))


def wait_for(job: Job, condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, while the job runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert job.process.is_alive() and time.monotonic() < deadline, f"the job ended before: {job.stderr}"
        time.sleep(0.001)


def kill_when(job: Job, condition: Callable[[], bool], number: signal.Signals = signal.SIGKILL) -> None:
    """Send the signal as soon as the condition holds."""
    wait_for(job, condition)
    assert job.process.pid
    os.kill(job.process.pid, number)
    job.wait(timeout_seconds=60)


def train_in_pool(run_dir: Path, data: Path, *overrides: str) -> bool:
    """A job of `based train` on a rank of a pool, where no process has to start. Returns whether the run is done."""
    config = parse_config(command(run_dir, data, *overrides)[4:])
    topology = build_topology(config.parallel, rank_device(dist.get_rank()))
    sources = Sources(config.data, config.train.global_batch_sequences)
    return train_in_folder(config, topology, sources, StopVote(run_dir / config.train.stop_file))


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step, the last word on each, from events.jsonl."""
    return {event["step"]: event["loss"] for event in read_events(run_dir / "events.jsonl") if event["event"] == "step"}


def events(run_dir: Path, name: str) -> list[dict]:
    """Events of one kind, in order."""
    return [event for event in read_events(run_dir / "events.jsonl") if event["event"] == name]
