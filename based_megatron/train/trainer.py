"""The training loop. Everything beside a step hangs on callbacks (train/callbacks/)."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from based_megatron.config import Config
from based_megatron.data.batch import MicroBatch
from based_megatron.errors import TrainingError
from based_megatron.parallel.topology import Topology
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.optimizer import set_learning_rate
from based_megatron.train.schedule import learning_rate
from based_megatron.train.step import Step
from based_megatron.train.stop import StopVote


class Batches(Protocol):
    """What the loop needs of a loader."""

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of the step after `step` finished ones."""


class Trainer:
    """Takes optimizer steps until the run is done or a stop is asked for."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        step_runner: Step,
        loader: Batches,
        callbacks: Sequence[Callback],
        stop: StopVote,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.config, self.topology, self.device = config, topology, topology.device
        self.run_dir = Path(config.run_dir)
        self.step_runner, self.loader, self.callbacks = step_runner, loader, callbacks
        self.stop = stop
        self.step, self.tokens_seen = start
        self._skipped_in_a_row = 0

    def fit(self) -> bool:
        """Train to the end or to a stop. Returns whether the run is done."""
        self.stop.clear()
        try:
            self._notify("on_start")
            while self.step < self.config.train.steps:
                self._notify("post_step", self._take_step())
                if reason := self.stop.agreed(self.device):
                    self.record("stop", reason=reason)
                    break
            self._notify("on_end")
        except BaseException as error:
            self._notify("on_error", error)
            raise
        return self.step >= self.config.train.steps

    def record(self, name: str, **fields: Any) -> None:
        """Tell the callbacks of something worth a record."""
        self._notify("on_event", name, fields)

    def validated(self, loss: float) -> None:
        """Tell the callbacks of a validation loss."""
        self._notify("on_validation", loss)

    def _take_step(self) -> StepReport:
        started = time.perf_counter()
        batches = self.loader.micro_batches(self.step)
        loaded = time.perf_counter()
        config = self.config
        lr = learning_rate(self.step, config.optimizer, config.schedule, config.train.steps)
        set_learning_rate(self.step_runner.engine, lr)
        loss = self.step_runner.accumulate(batches).mean
        computed = time.perf_counter()
        grad_norm = self.step_runner.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        tokens = config.train.global_batch_sequences * config.data.sequence_length_tokens
        self.step += 1
        self.tokens_seen += tokens
        skipped = not math.isfinite(grad_norm)
        self._guard(skipped, loss)
        seconds = {
            "total": ended - started,
            "data": loaded - started,
            "forward_backward": computed - loaded,
            "optimizer": ended - computed,
        }
        return StepReport(self.step, loss, grad_norm, lr, skipped, tokens, seconds)

    def _guard(self, skipped: bool, loss: float) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.record("skip", loss=loss, in_a_row=self._skipped_in_a_row)
        if self._skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"{self._skipped_in_a_row} steps in a row had no finite gradient (loss {loss} at step {self.step}); the newest checkpoint "
                f"is from before them: lower optimizer.lr, or look at the documents with `based data --step`"
            )

    def _notify(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)
