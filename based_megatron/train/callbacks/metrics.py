"""What the console, TensorBoard and the events file have in common: one rank that writes, log points, throughput."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from based_megatron.monitor.flops import training_flops_per_token
from based_megatron.monitor.throughput import Throughput, ThroughputMeter, peak_flops_of_run
from based_megatron.train.callbacks.base import Callback, StepReport

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class MetricsLogger(Callback):
    """Calls `log` at the first step, every log interval and the last step, on the logging rank only."""

    meter: ThroughputMeter

    def on_start(self, trainer: Trainer) -> None:
        config = trainer.config
        self.meter = ThroughputMeter(
            training_flops_per_token(config.model, config.data.sequence_length_tokens),
            trainer.topology.world_size,
            peak_flops_of_run(config, trainer.device),
        )
        if trainer.topology.is_logger:
            self.start(trainer)

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        if not trainer.topology.is_logger:
            return
        self.meter.add(report)
        interval_steps = trainer.config.monitor.log_interval_steps
        if report.step == 1 or report.step % interval_steps == 0 or report.step == trainer.config.train.steps:
            self.log(trainer, report, self.meter.take())

    def start(self, trainer: Trainer) -> None:
        """Open what the logger writes to."""

    def log(self, trainer: Trainer, report: StepReport, throughput: Throughput | None) -> None:
        """Write a step, with the throughput since the last one written (None until a step has been measured)."""
        raise NotImplementedError


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf beyond the range of a float."""
    return math.exp(loss) if loss < 700 else math.inf
