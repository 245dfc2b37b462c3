"""What is logged: the metrics hub at log points, and events, on their way to the sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from based_megatron.monitor.flops import parameter_count, training_flops_per_token
from based_megatron.monitor.memory import memory_gib
from based_megatron.monitor.sinks.base import Sink, perplexity
from based_megatron.monitor.throughput import ThroughputMeter, peak_flops_of_run
from based_megatron.train.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Logger(Callback):
    """Collects the metrics of all ranks at the first step, every log interval and the last step, and feeds the sinks of one rank."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        """sinks: started ones; none on ranks that do not log."""
        self._sinks = list(sinks)
        self._is_first = True

    def on_start(self, trainer: Trainer) -> None:
        config, topology = trainer.config, trainer.topology
        flops_per_token = training_flops_per_token(config.model, config.data.sequence_length_tokens)
        peak_flops = peak_flops_of_run(config, trainer.device)
        self._meter = ThroughputMeter(flops_per_token, topology.world_size, peak_flops)
        self._tell(
            trainer,
            "resume" if trainer.step else "start",
            tokens_seen=trainer.tokens_seen,
            world_size=topology.world_size,
            parameters=parameter_count(config.model),
            data_jumps=trainer.guard.data.jumps,
        )

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        self._meter.add(report.tokens)
        if self._is_first:
            self._is_first = False
            trainer.clock.take()
            self._meter.restart()
        if trainer.logs(report.step):
            self._log(trainer, report)

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
        self._tell(trainer, "end", tokens_seen=trainer.tokens_seen, skipped_steps=trainer.skips.total)
        self._close()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._tell(trainer, "error", type=type(error).__name__, message=str(error))
        self._close()

    def _log(self, trainer: Trainer, report: StepReport) -> None:
        metrics = trainer.metrics
        metrics.record("train/loss", report.loss, "last")
        metrics.record("train/grad_norm", report.grad_norm, "last")
        speed = self._meter.take(trainer.clock.take())
        if speed:
            metrics.record("time/step_seconds_slowest", speed["time/step_seconds"], "max")
            metrics.record("time/step_seconds_fastest", speed["time/step_seconds"], "min")
            metrics.record("time/data_seconds_slowest", speed["time/data_seconds"], "max")
        for name, gib in memory_gib(trainer.device).items():
            metrics.record(f"memory/{name}", gib, "max")
        values = metrics.collect()
        values |= {
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

    def _tell(self, trainer: Trainer, name: str, **fields: Any) -> None:
        step = fields.pop("step", trainer.step)
        for sink in self._sinks:
            sink.event(step, name, fields)

    def _close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []
