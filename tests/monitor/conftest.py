"""A stand-in for the trainer: what callbacks may use of it, and a loop that calls the hooks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.config import Config, ModelConfig, MonitorConfig, TrainConfig
from based_megatron.train.callbacks.base import StepReport

TOKENS_PER_STEP = 512


@dataclass
class FakeTrainer:
    run_dir: Path
    config: Config
    step: int = 0
    is_logger: bool = True
    world_size: int = 4
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def topology(self) -> SimpleNamespace:
        return SimpleNamespace(rank=0, is_logger=self.is_logger, world_size=self.world_size)

    @property
    def tokens_seen(self) -> int:
        return self.step * TOKENS_PER_STEP

    def run(self, callbacks: Sequence[Any], until: int) -> None:
        """Start, and train up to a step; neither end nor error, as in a run that is killed."""
        for callback in callbacks:
            callback.on_start(self)
        while self.step < until:
            self.step += 1
            for callback in callbacks:
                callback.post_step(self, make_report(self.step))


def make_report(step: int, **changes: Any) -> StepReport:
    """Loss 1/step; steps of 2 s, the first one of 100 s."""
    report = StepReport(
        step=step,
        loss=1 / step,
        grad_norm=2.0 * step,
        lr=1e-3 * step,
        skipped=False,
        tokens=TOKENS_PER_STEP,
        seconds={"total": 100.0 if step == 1 else 2.0, "data": 0.5, "forward_backward": 1.0, "optimizer": 0.25},
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of a small model on 4 ranks, 10 steps, a log point every 2."""

    def make(**changes) -> FakeTrainer:
        config = Config(
            model=ModelConfig(layer_pattern="cLS", hidden_size=64, ffn_hidden_size=128, num_heads=4, vocab_size=100),
            train=TrainConfig(steps=10),
            monitor=MonitorConfig(log_interval_steps=2, peak_flops=1e9),
        )
        return FakeTrainer(**({"run_dir": tmp_path, "config": config} | changes))

    return make


@pytest.fixture
def report():
    """Maker of step reports."""
    return make_report
