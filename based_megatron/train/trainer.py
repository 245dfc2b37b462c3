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
from based_megatron.errors import DataError, TrainingError
from based_megatron.monitor.clock import StepClock
from based_megatron.monitor.hub import Metrics
from based_megatron.parallel.partitions import Piece
from based_megatron.parallel.topology import Topology
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.guard import Guard, Return
from based_megatron.train.optimizer import set_learning_rate
from based_megatron.train.schedule import learning_rate
from based_megatron.train.skips import SkipCount
from based_megatron.train.step import Step
from based_megatron.train.stop import StopVote
from based_megatron.train.suspects import Suspects


class Batches(Protocol):
    """What the loop needs of a loader."""

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of the step after `step` finished ones."""

    def documents(self, step: int) -> list[str]:
        """Some of the documents of that step, over all ranks."""


class Rollback(Protocol):
    """What the loop needs of checkpoints: loads the newest good one of a step up to the given one, and returns its step and tokens.

    None if there is none.
    """

    def __call__(self, latest_step: int, /) -> tuple[int, int] | None: ...


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
        guard: Guard,
        go_back: Rollback,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.config, self.topology, self.device = config, topology, topology.device
        self.run_dir = Path(config.run_dir)
        self.step_runner, self.loader, self.callbacks = step_runner, loader, callbacks
        self.metrics, self.clock = metrics, StepClock(self.device)
        self.stop, self.guard, self._go_back = stop, guard, go_back
        self.step, self.tokens_seen = start

    def fit(self) -> bool:
        """Train to the end or to a stop. Returns whether the run is done."""
        self.stop.forget_last()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.step < self.config.train.steps:
                batches, failure = self._read()
                with self.doing("stop vote"):
                    reason = self.stop.agreed(failure)
                if reason:
                    self.record("stop", reason=reason)
                    break
                if report := self._take_step(batches):
                    for callback in self.callbacks:
                        callback.post_step(self, report)
            self._record_spikes()
            with self.doing("end"):
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

    @property
    def is_healthy(self) -> bool:
        """Whether the last step that was read changed the weights: a checkpoint made now is one to go back to."""
        return not self.skips.in_a_row

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

    @property
    def skips(self) -> SkipCount:
        """The steps that were skipped."""
        return self.guard.skips

    def advice(self, step: int) -> str:
        """What a user can do about a step that went wrong, as the end of an error's line."""
        for callback in self.callbacks:
            callback.settle()
        found = find_checkpoint(self.run_dir / FOLDER)
        newest = "no checkpoint was saved" if found is None else f"the newest checkpoint is step {step_of(found)}"
        return f"{newest}: lower optimizer.lr, or look at the documents with `{self._look(step)}`"

    def _look(self, step: int) -> str:
        """The command that lists the documents of a step, counted from 1."""
        data_step = self.guard.data.data_step(step - 1) + 1
        return f"based data at --run {shlex.quote(str(self.run_dir))} --data-step {data_step}"

    def _read(self) -> tuple[list[MicroBatch], str]:
        """This rank's micro batches of the next step, and why there are none."""
        self.clock.begin("data", self.step + 1)
        try:
            return self.loader.micro_batches(self.guard.data.data_step(self.step)), ""
        except DataError as error:
            return [], str(error)
        finally:
            self.clock.end()

    def _take_step(self, batches: list[MicroBatch]) -> StepReport | None:
        """Take one step. None if the run has gone back to an earlier one."""
        self.metrics.wanted = self.logs(self.step + 1)
        self.clock.begin("forward_backward")
        config = self.config
        lr = learning_rate(self.step, config.optimizer, config.schedule, config.train.steps)
        set_learning_rate(self.step_runner.engine, lr)
        loss = self.step_runner.accumulate(batches, self.clock).mean
        self.clock.begin("optimizer")
        suspects = Suspects(self.gradients)
        update = self.step_runner.update(self._on_gradients, lambda norm: self.guard.judge(loss, norm), suspects.look)
        self.clock.end()
        tokens = config.train.global_batch_sequences * config.data.sequence_length_tokens
        self.step += 1
        self.tokens_seen += tokens
        self.guard.settle(self.step, loss, update.grad_norm, update.applied)
        if not update.applied and self._skipped(float(loss), float(update.grad_norm), suspects):
            return None
        if self.metrics.wanted:
            self._record_spikes()
        return StepReport(self.step, loss, update.grad_norm, lr, tokens)

    def _on_gradients(self) -> None:
        for callback in self.callbacks:
            callback.on_gradients(self)

    def _record_spikes(self) -> None:
        for spike in self.guard.spikes():
            self.record("spike", **vars(spike), look=self._look(spike.step))

    def _skipped(self, loss: float, grad_norm: float, suspects: Suspects) -> bool:
        """Record a skipped step, and go back if too many were. Returns whether the run has gone back."""
        reason = self.guard.reason(grad_norm)
        self.record(
            "skip",
            step=self.step,
            loss=loss,
            grad_norm=grad_norm,
            reason=reason,
            in_a_row=self.skips.in_a_row,
            parameters=suspects.names(),
            documents=self.loader.documents(self.guard.data.data_step(self.step - 1)),
            look=self._look(self.step),
        )
        wish = self.guard.wants_return(self.step, reason)
        if wish is not None:
            self._return(wish)
        return wish is not None

    def _return(self, wish: Return) -> None:
        """Go back to a good checkpoint and step over the data since. Raises TrainingError if that is not to be."""
        guard, bad_step, advice = self.guard, self.step, self.advice(self.step - max(self.skips.in_a_row, 1) + 1)
        rollbacks, data_step = guard.rollbacks + 1, guard.data.data_step(bad_step)
        with self.doing("rollback"):
            found = self._go_back(wish.latest_step) if guard.may_return else None
        if found is None:
            tried = f" after {guard.rollbacks} rollbacks" if guard.rollbacks else ""
            raise TrainingError(f"{wish.reason}{tried}; {advice}")
        self.step, self.tokens_seen = found
        missed_steps = data_step - guard.data.data_step(self.step)
        self.step_runner.miss(missed_steps * self.config.data.sequence_length_tokens)
        guard.returned(self.step, data_step, rollbacks)
        self.record(
            "rollback",
            step=bad_step,
            to_step=self.step,
            reason=wish.reason,
            rollbacks=rollbacks,
            skipped_data_steps=missed_steps,
            data_jumps=guard.data.jumps,
        )
