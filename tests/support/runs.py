"""Whole `based train` jobs on a tiny corpus, in processes of their own or on the ranks of a pool."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from based_megatron.config import parse_config
from based_megatron.data.sources import Sources
from based_megatron.monitor.events import read_events
from based_megatron.parallel.topology import build_topology
from based_megatron.train.stop import StopVote
from based_megatron.train.train import train_over
from support.pool import rank_device

TINY = [
    "--config", "tiny", "--model.layer-pattern", "cLSA", "--model.hidden-size", "32", "--model.ffn-hidden-size", "48",
    "--model.vocab-size", "300", "--data.sequence-length-tokens", "64", "--train.micro-batch-sequences", "2",
    "--train.global-batch-sequences", "8", "--train.steps", "8", "--validation.interval-steps", "4", "--validation.sequences", "4",
    "--checkpoint.interval-steps", "2", "--checkpoint.keep-last", "0", "--monitor.log-interval-steps", "1",
    "--monitor.sample-interval-steps", "0",
]  # fmt: skip


def command(run_dir: Path, data: Path, *overrides: str, nproc: int = 1) -> list[str]:
    """The command line of a job: one process, or `nproc` ranks under `based launch local`."""
    train = ["train", *TINY, "--run-dir", str(run_dir), "--data.path", str(data), *overrides]
    launch = ["launch", "local", "--nproc", str(nproc), "--"] if nproc > 1 else []
    return [sys.executable, "-m", "based_megatron", *launch, *train]


def run_job(
    run_dir: Path, data: Path, *overrides: str, nproc: int = 1, timeout: int = 240, **options: Any
) -> subprocess.CompletedProcess:
    """Run a job to its end."""
    return subprocess.run(
        command(run_dir, data, *overrides, nproc=nproc),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def start_job(run_dir: Path, corpus: Path, *overrides: str) -> subprocess.Popen:
    """Start a job of one process, to be disturbed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(run_dir, corpus, *overrides), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_when(
    process: subprocess.Popen, condition: Callable[[], bool], number: signal.Signals = signal.SIGKILL
) -> None:
    """Send the signal as soon as the condition holds."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the job ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(number)
    process.wait(timeout=60)


def train_in_pool(run_dir: Path, data: Path, *overrides: str) -> bool:
    """The same job on a rank of a pool, where no process has to start. Returns whether the run is done."""
    config = parse_config(command(run_dir, data, *overrides)[4:])
    topology = build_topology(config.parallel, rank_device(dist.get_rank()))
    sources = Sources(config.data, config.train.global_batch_sequences)
    return train_over(config, topology, sources, StopVote(run_dir / config.train.stop_file))


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step, the last word on each, from events.jsonl."""
    return {event["step"]: event["loss"] for event in read_events(run_dir / "events.jsonl") if event["event"] == "step"}


def events(run_dir: Path, name: str) -> list[dict]:
    """Events of one kind, in order."""
    return [event for event in read_events(run_dir / "events.jsonl") if event["event"] == name]
