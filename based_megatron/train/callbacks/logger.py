"""What is logged: the metrics hub at log points, and events, on their way to the sinks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from based_megatron.errors import BasedError
from based_megatron.monitor.eta import Eta, Repeated
from based_megatron.monitor.flops import parameter_count, training_flops_per_token
from based_megatron.monitor.memory import memory_gib
from based_megatron.monitor.sinks.base import Sink, perplexity
from based_megatron.monitor.stragglers import Stragglers
from based_megatron.monitor.throughput import ThroughputMeter, peak_flops_of_run, process_seconds
from based_megatron.run_folder.failures import wait_for_cause, write_failure
from based_megatron.run_folder.files import ERRORS
from based_megatron.train.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer

CAUSE_SECONDS = 5.0
"""For so long the logging rank waits, after an error that comes of another rank's, for that one."""


class Logger(Callback):
    """Collects the metrics of all ranks at the first step, every log interval and the last step, and feeds the sinks of one rank.

    Loss and gradient norm of each step stay on the device until a log point or a save: a checkpoint is never ahead of the log.
    """

    def __init__(self, sinks: Sequence[Sink], hosts: Sequence[str] = ()) -> None:
        """sinks: started ones; none on ranks that do not log. hosts: the name of each rank's host."""
        self._sinks, self._hosts = list(sinks), hosts
        self._is_first = True
        self._unread: list[StepReport] = []
        self._interval: list[tuple[float, float]] = []
        """Loss and gradient norm of the steps since the last log point that were read."""

    def on_start(self, trainer: Trainer) -> None:
        config, topology = trainer.config, trainer.topology
        flops_per_token = training_flops_per_token(config.model, config.data.sequence_length_tokens)
        peak_flops = peak_flops_of_run(config, trainer.device)
        self._meter = ThroughputMeter(flops_per_token, topology.world_size, peak_flops)
        saves = config.checkpoint
        repeated = {
            "validation": Repeated(config.validation.interval_steps),
            "save": Repeated(saves.interval_steps, saves.interval_seconds),
        }
        self._stragglers = Stragglers(topology.pipeline.size)
        self._eta = Eta(config.train.steps, repeated)
        self._tell(
            trainer,
            "resume" if trainer.step else "start",
            tokens_seen=trainer.tokens_seen,
            world_size=topology.world_size,
            parameters=parameter_count(config.model),
            data_jumps=trainer.guard.data.jumps,
            process_seconds=process_seconds(),
            hosts=dict(Counter(self._hosts)),
        )

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        self._meter.add(report.tokens)
        if self._is_first:
            self._is_first = False
            trainer.clock.take()
            trainer.clock.progress.take()
            self._meter.restart()
        if self._unread and report.step != self._unread[-1].step + 1:
            self._write_steps()  # The run went back to an earlier step.
        if self._sinks:
            self._unread.append(report)
        if trainer.logs(report.step):
            with trainer.doing("log"):
                self._log(trainer, report)

    def pre_save(self, trainer: Trainer) -> None:
        self._write_steps()
        for sink in self._sinks:
            sink.flush()

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        self._tell(trainer, "validation", loss=loss, perplexity=perplexity(loss))

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        self._tell(trainer, name, **fields)
        if name == "skip":
            self._meter.skip()
        if name == "sample":
            for sink in self._sinks:
                sink.text(trainer.step, f"sample/{fields['prompt']}", f"{fields['prompt']}|{fields['text']}")

    def on_end(self, trainer: Trainer) -> None:
        self._write_steps()
        self._tell(trainer, "end", tokens_seen=trainer.tokens_seen, skipped_steps=trainer.skips.total)
        self._close()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        if isinstance(error, BasedError) or trainer.device.type == "cpu":  # else the device may never answer again
            self._write_steps()
        with contextlib.suppress(OSError):
            folder = trainer.run_dir / ERRORS
            own = write_failure(folder, trainer.topology.rank, error)
            since = time.time() - process_seconds()
            cause = wait_for_cause(folder, since, self._hosts or [own.host], CAUSE_SECONDS) if self._sinks else own
            fields = dataclasses.asdict(cause or own)
            del fields["time"], fields["is_final"]
            self._tell(trainer, "error", **fields)
        self._close()

    def _log(self, trainer: Trainer, report: StepReport) -> None:
        self._write_steps()
        metrics = trainer.metrics
        metrics.record("train/loss", report.loss, "last")
        metrics.record("train/grad_norm", report.grad_norm, "last")
        phases = trainer.clock.progress.take()
        speed = self._meter.take(trainer.clock.take(), phases)
        if speed:
            self._eta.add(phases)
            other_seconds = speed["wall_seconds/other"] / self._meter.steps_in_all
            speed["time/eta_seconds"] = self._eta.seconds(report.step, speed["time/step_seconds"], other_seconds)
            metrics.record("time/step_seconds_slowest", speed["time/step_seconds"], "max")
            metrics.record("time/step_seconds_fastest", speed["time/step_seconds"], "min")
            metrics.record("time/data_seconds_slowest", speed["time/data_seconds"], "max")
            speed |= self._compare(trainer, metrics.each_rank(speed["time/own_seconds"]))
        for name, gib in memory_gib(trainer.device).items():
            metrics.record(f"memory/{name}", gib, "max")
        values = metrics.collect()
        values |= {
            **self._over_interval(),
            "train/perplexity": perplexity(values["train/loss"]),
            "train/lr": report.lr,
            "train/skipped": trainer.skips.in_a_row > 0,
            "train/skipped_steps": trainer.skips.total,
            "train/rollbacks": trainer.guard.rollbacks,
            "train/tokens_seen": trainer.tokens_seen,
            **speed,
        }
        for sink in self._sinks:
            sink.log(report.step, values)

    def _compare(self, trainer: Trainer, seconds: list[float]) -> dict[str, float]:
        """Metrics of the slowest rank, from the seconds of each rank's own work in a step; records those that stay behind."""
        for found in self._stragglers.add(seconds):
            host = self._hosts[found.rank] if self._hosts else ""
            self._tell(trainer, "straggler", host=host, **dataclasses.asdict(found))
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {
            "time/slowest_rank": slowest,
            "time/own_seconds_slowest": seconds[slowest],
            "time/own_seconds_median": statistics.median(seconds),
        }

    def _write_steps(self) -> None:
        """Read the steps that are still on the device, and give them to the sinks."""
        if not self._unread:
            return
        pairs = torch.stack([torch.stack([report.loss, report.grad_norm]) for report in self._unread]).tolist()
        first_step, self._unread = self._unread[0].step, []
        self._interval += pairs
        losses, grad_norms = zip(*pairs, strict=True)
        for sink in self._sinks:
            sink.steps(first_step, losses, grad_norms)

    def _over_interval(self) -> dict[str, float]:
        """Means and maxima over the steps since the last log point; {} on ranks that do not log."""
        pairs, self._interval = self._interval, []
        if not pairs:
            return {}
        losses, grad_norms = zip(*pairs, strict=True)
        return {
            "train/loss_mean": sum(losses) / len(losses),
            "train/loss_max": _largest(losses),
            "train/grad_norm_max": _largest(grad_norms),
        }

    def _tell(self, trainer: Trainer, name: str, **fields: Any) -> None:
        step = fields.pop("step", trainer.step)
        for sink in self._sinks:
            sink.event(step, name, fields)

    def _close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def _largest(values: Sequence[float]) -> float:
    """The largest; inf if one is nan, which a maximum may drop."""
    return max(math.inf if math.isnan(value) else value for value in values)
