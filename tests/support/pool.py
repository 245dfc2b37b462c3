"""Pools of gloo ranks, forked from a server that has imported everything: imports cost more than most tests."""

import contextlib
import functools
import gc
import multiprocessing as mp
import os
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

RUNS_ON_CPU, RUNS_ON_GPU = 1, 4
"""A pool is replaced after so many: groups of earlier layouts are never freed, and their threads or buffers add up.
A fork of what is already imported costs 0.1 s, a process with CUDA many seconds."""
JOIN_SECONDS = 120
"""Timeout of the ranks' world."""
PRELOAD = [
    "based_megatron.train.optimizer.muon", "based_megatron.train.train", "based_megatron.train.cli", "deepspeed",
    # What libraries import at the first use, and each rank would by itself.
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon",
    "megatron.core.transformer.multi_token_prediction", "tensorboard.plugins.hparams.metadata", "torch._dynamo.trace_rules", "typeguard",
]  # fmt: skip


class RankFailure(AssertionError):
    """A function raised on a rank; the text is its traceback."""


class WorkerPool:
    """`world_size` processes joined by gloo, or NCCL on GPUs.

    `run` calls a module-level function on each and returns the results in rank order.
    """

    def __init__(self, world_size: int, timeout_seconds: float = 180.0) -> None:
        self.world_size, self.timeout_seconds, self.runs = world_size, timeout_seconds, 0
        context = fork_context()
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @property
    def spent(self) -> bool:
        """True after some runs, and once a rank has died or hung: the others cannot be used either."""
        alive = [process.is_alive() for process in self.processes]
        return self.runs >= (RUNS_ON_GPU if on_gpu() else RUNS_ON_CPU) or not alive or not all(alive)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call function(*args, **kwargs) on every rank. Raises RankFailure with the first traceback, after a hang too."""
        self.runs += 1
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, failure = [], None
        for rank, pipe in enumerate(self.pipes):
            if failure is None and not pipe.poll(self.timeout_seconds):
                failure = f"rank {rank} gave no answer in {self.timeout_seconds:.0f} s"
            if failure is None or pipe.poll(1.0):
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, f"rank {rank} died"
                results.append(value)
                failure = failure or (None if ok else f"rank {rank}:\n{value}")
        if failure is not None:
            self.close()
            raise RankFailure(failure)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@functools.cache
def fork_context() -> Any:
    """The context that starts processes: a server that has imported everything, and forks; on GPUs a new interpreter for each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if on_gpu():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def on_gpu() -> bool:
    """True if ranks of the pool get a GPU each."""
    return os.environ.get("BASED_TEST_DEVICE", "cpu") == "cuda"


def rank_device(rank: int) -> torch.device:
    """The CPU, or a GPU for each rank where BASED_TEST_DEVICE=cuda."""
    if not on_gpu():
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def free_port() -> int:
    """A TCP port that nobody listens on now, below those that connections take by themselves."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("100 ports in a row are taken")


def keep_what_is_shared() -> None:
    """Leave what a forked process has of its server out of garbage collections, which would copy its memory: half of a job's time."""
    gc.freeze()


def _serve(pipe: Any, rank: int, world_size: int, port: int) -> None:
    from based_megatron.parallel.environment import RankInfo
    from based_megatron.parallel.topology import join
    from support.interpreter import patch_interpreter

    keep_what_is_shared()
    torch.set_num_threads(1)
    if not on_gpu():
        patch_interpreter()
    join(RankInfo(rank, world_size, rank, "127.0.0.1", port), rank_device(rank), timeout_seconds=JOIN_SECONDS)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
