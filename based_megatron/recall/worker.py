"""A worker of a sweep: a process that trains one point after another."""

import gc
import os
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from based_megatron.errors import BasedError
from based_megatron.parallel.topology import join_alone
from based_megatron.process import end_with
from based_megatron.recall.model import ProductModel, RecallModel, prepare_for_gpu
from based_megatron.recall.mqar import Data
from based_megatron.recall.presets import Preset
from based_megatron.recall.systems import Point, state_bytes
from based_megatron.recall.train import OutOfTime, race


@dataclass(frozen=True)
class Job:
    """A point with a seed."""

    point: Point
    seed: int
    key: str
    """The job in results: of task, recipe, point and seed."""


@dataclass(frozen=True)
class Setup:
    """What all workers of a sweep share."""

    preset: Preset
    devices: tuple[str, ...]
    """Devices of PyTorch, among which workers are shared out."""
    backend: str
    threads: int
    """Threads of PyTorch in a worker on a CPU, and of the compiler of layers on a GPU."""
    deadline: float | None
    """Time at which runs are given up, in seconds since the epoch; None: never."""
    compiled: bool = True
    """Whether a GPU trains layers in plain PyTorch through torch.compile."""


class Trainer:
    """The data of a sweep on the device, and a process group of one, which mixers are built with."""

    def __init__(self, setup: Setup, device: str) -> None:
        self.setup, self.device = setup, torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(setup.threads)
        else:
            torch.cuda.set_device(self.device.index or 0)
            prepare_for_gpu(setup.threads)
        self.topology = join_alone(self.device)
        self.data = Data(setup.preset.task, self.device)

    def result(self, job: Job) -> dict[str, Any]:
        """Train a point; returns what its line in the results says. Raises OutOfTime."""
        start, cpu_start = time.perf_counter(), time.process_time()
        point, preset, parameters = job.point, self.setup.preset, 0

        def build() -> nn.Module:
            nonlocal parameters
            model = self._model(point, job.seed)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            return model

        rates = race(build, self.data, preset.recipe, job.seed, self._check_time)
        if self.device.type == "cuda":
            # Graphs hold memory until the models that they are of are gone, and what is compiled is of these models alone.
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
        return {
            "state_bytes": asdict(state_bytes(point.model, preset.task.longest_tokens)),
            "parameters": parameters,
            "rates": [asdict(rate) for rate in rates],
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu_start, 1),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
        }

    def _model(self, point: Point, seed: int) -> nn.Module:
        backend = self.setup.backend
        if point.product:
            return ProductModel(point.model, self.topology, backend=backend, seed=seed)
        compiled = self.setup.compiled and self.device.type == "cuda"
        return RecallModel(point.model, self.topology, backend=backend, seed=seed, block=point.block, compiled=compiled)

    def _check_time(self) -> None:
        if self.setup.deadline is not None and time.time() > self.setup.deadline:
            raise OutOfTime


def serve(pipe: Connection, setup: Setup, device: str) -> None:
    """A worker process: takes jobs from the pipe and sends back what came of each, until its sweep ends."""
    end_with(os.getppid())
    trainer: Trainer | None = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            trainer = trainer or Trainer(setup, device)
            pipe.send(trainer.result(job))
        except OutOfTime:
            pipe.send(None)
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            pipe.send({"failed": words if isinstance(error, BasedError) else f"{type(error).__name__}: {words}"})
