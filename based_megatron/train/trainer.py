"""The training loop. Everything besides a step hangs on callbacks (train/callbacks/)."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from based_megatron.checkpoint.store import FOLDER, find_checkpoint, step_of
from based_megatron.config import Config
from based_megatron.data.batch import MicroBatch
from based_megatron.errors import TrainingError
from based_megatron.monitor.clock import StepClock
from based_megatron.monitor.hub import Metrics
from based_megatron.parallel.partitions import Piece
from based_megatron.parallel.topology import Topology
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.optimizer import set_learning_rate
from based_megatron.train.schedule import learning_rate
from based_megatron.train.skips import SkipCount
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
        metrics: Metrics,
        callbacks: Sequence[Callback],
        stop: StopVote,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.config, self.topology, self.device = config, topology, topology.device
        self.run_dir = Path(config.run_dir)
        self.step_runner, self.loader, self.callbacks = step_runner, loader, callbacks
        self.metrics, self.clock, self.skips = metrics, StepClock(self.device), SkipCount()
        self.stop = stop
        self.step, self.tokens_seen = start

    def fit(self) -> bool:
        """Train to the end or to a stop. Returns whether the run is done."""
        self.stop.forget_last()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.step < self.config.train.steps:
                report = self._take_step()
                for callback in self.callbacks:
                    callback.post_step(self, report)
                with self.doing("stop vote"):
                    reason = self.stop.agreed()
                if reason:
                    self.record("stop", reason=reason)
                    break
            self.check_skips()
            for callback in reversed(self.callbacks):
                callback.on_end(self)
            self.stop.honoured()
        except BaseException as error:
            for callback in reversed(self.callbacks):
                callback.on_error(self, error)
            raise
        return self.step >= self.config.train.steps

    def logs(self, step: int) -> bool:
        """Whether a step, counted from 1, is a log point."""
        return step == 1 or step % self.config.monitor.log_interval_steps == 0 or step == self.config.train.steps

    def record(self, name: str, **fields: Any) -> None:
        """Tell the callbacks of something worth a record."""
        for callback in self.callbacks:
            callback.on_event(self, name, fields)

    def validated(self, loss: float) -> None:
        """Tell the callbacks of a validation loss."""
        for callback in self.callbacks:
            callback.on_validation(self, loss)

    def doing(self, phase: str) -> AbstractContextManager[None]:
        """Says that this rank is in a phase, to those who watch for hangs and add up where time goes."""
        return self.clock.progress.inside(phase)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside it a checkpoint is made; the callbacks hear of it before."""
        for callback in self.callbacks:
            callback.pre_save(self)
        with self.doing("save"):
            yield

    def gradients(self) -> Iterable[tuple[Piece, Tensor]]:
        """The reduced gradients that this rank's part of the optimizer will take, fp32 and flat; for `on_gradients`."""
        return self.step_runner.engine.gradients()

    def check_skips(self) -> None:
        """Record skipped steps that were not recorded yet. Waits for the device.

        Raises TrainingError if too many came in a row.
        """
        for skip in self.skips.read():
            self.record("skip", step=skip.step, loss=skip.loss, in_a_row=skip.in_a_row)
            if skip.in_a_row >= self.config.train.max_skipped_steps:
                raise TrainingError(
                    f"{skip.in_a_row} steps in a row had no finite gradient (loss {skip.loss} at step {skip.step}); "
                    f"{self.advice(skip.step - skip.in_a_row + 1)}"
                )

    def advice(self, step: int) -> str:
        """What a user can do about a step that went wrong, as the end of an error's line."""
        found = find_checkpoint(self.run_dir / FOLDER)
        newest = "no checkpoint was saved" if found is None else f"the newest checkpoint is step {step_of(found)}"
        look = f"based data at --run {shlex.quote(str(self.run_dir))} --step {step}"
        return f"{newest}: lower optimizer.lr, or look at the documents with `{look}`"

    def _take_step(self) -> StepReport:
        self.metrics.wanted = self.logs(self.step + 1)
        self.clock.begin("data", self.step + 1)
        batches = self.loader.micro_batches(self.step)
        self.clock.begin("forward_backward")
        config = self.config
        lr = learning_rate(self.step, config.optimizer, config.schedule, config.train.steps)
        set_learning_rate(self.step_runner.engine, lr)
        loss = self.step_runner.accumulate(batches, self.clock).mean
        self.clock.begin("optimizer")
        grad_norm = self.step_runner.update(self._on_gradients).grad_norm
        self.clock.end()
        tokens = config.train.global_batch_sequences * config.data.sequence_length_tokens
        self.step += 1
        self.tokens_seen += tokens
        self.skips.add(self.step, loss, grad_norm)
        if self.metrics.wanted or self.skips.unread >= config.train.max_skipped_steps:
            self.check_skips()
        return StepReport(self.step, loss, grad_norm, lr, tokens)

    def _on_gradients(self) -> None:
        for callback in self.callbacks:
            callback.on_gradients(self)
