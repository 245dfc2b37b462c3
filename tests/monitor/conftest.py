"""Runs for sinks, and a stand-in for the trainer: what the logger and the heartbeat may use of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.config import Config, ModelConfig, MonitorConfig, TrainConfig
from based_megatron.data.jumps import DataJumps
from based_megatron.monitor.hub import Metrics
from based_megatron.monitor.progress import Progress
from based_megatron.monitor.sinks.base import RunFacts
from based_megatron.train.callbacks.base import StepReport
from based_megatron.train.skips import SkipCount

TOKENS_PER_STEP = 512


def small_config(**monitor: Any) -> Config:
    """A small model, 10 steps, a log point every 2."""
    return Config(
        model=ModelConfig(layer_pattern="cLS", hidden_size=64, ffn_hidden_size=128, num_heads=4, vocab_size=100),
        train=TrainConfig(steps=10),
        monitor=MonitorConfig(**{"log_interval_steps": 2, "peak_flops": 1e9, **monitor}),
    )


@pytest.fixture
def make_run(tmp_path) -> Callable[..., RunFacts]:
    """Facts of a run of a small model on 4 ranks."""

    def make(step: int = 0, **monitor: Any) -> RunFacts:
        tokens_seen = step * TOKENS_PER_STEP
        config, device, tokens = small_config(**monitor), torch.device("cpu"), (2_000_000, 1_999_600)
        return RunFacts(
            config, tmp_path, device, 4, step, tokens_seen, "f00d", "a run", *tokens, ("web: 4M tokens, 2 epochs",)
        )

    return make


def values_of(step: int, **changes: float) -> dict[str, float]:
    """Metrics of a log point as the logger makes them."""
    return {
        "train/loss": 1 / step,
        "train/grad_norm": 2.0 * step,
        "train/perplexity": 2.5,
        "train/lr": 1e-3 * step,
        "train/skipped": False,
        "train/skipped_steps": 0,
        "train/rollbacks": 0,
        "train/tokens_seen": TOKENS_PER_STEP * step,
        "memory/rss_gib": 0.5,
        **changes,
    }


SPEED = {
    "throughput/tokens_per_second": 256.0,
    "throughput/mfu": 0.064,
    "throughput/goodput": 0.9,
    "time/eta_seconds": 196.0,
    "time/step_seconds": 2.0,
    "time/data_seconds": 0.5,
}


class FakeClock:
    """Steps of 2 s, the first one of 100 s."""

    def __init__(self) -> None:
        self.seconds = {"total": 0.0}
        self.progress = Progress()

    def step(self, number: int) -> None:
        parts = {
            "total": 100.0 if number == 1 else 2.0,
            "data": 0.5,
            "forward_backward": 1.0,
            "own": 0.75,
            "optimizer": 0.25,
        }
        self.seconds = {name: self.seconds.get(name, 0.0) + value for name, value in parts.items()}

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {"total": 0.0}
        return taken


@dataclass
class FakeTrainer:
    run_dir: Path
    config: Config = field(default_factory=small_config)
    step: int = 0
    is_logger: bool = True
    world_size: int = 4
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: FakeClock = field(default_factory=FakeClock)
    skips: SkipCount = field(default_factory=SkipCount)
    guard: Any = field(default_factory=lambda: SimpleNamespace(rollbacks=0, data=DataJumps()))
    metrics: Metrics = field(default_factory=lambda: Metrics(torch.device("cpu")))

    @property
    def topology(self) -> SimpleNamespace:
        return SimpleNamespace(
            rank=0, is_logger=self.is_logger, world_size=self.world_size, pipeline=SimpleNamespace(size=1)
        )

    @property
    def tokens_seen(self) -> int:
        return self.step * TOKENS_PER_STEP

    def doing(self, phase: str) -> AbstractContextManager[None]:
        return self.clock.progress.inside(phase)

    def logs(self, step: int) -> bool:
        return step in (1, self.config.train.steps) or step % self.config.monitor.log_interval_steps == 0

    def run(self, callbacks: Sequence[Any], until: int) -> None:
        """Start, and train up to a step; neither end nor error, as in a run that is killed."""
        for callback in callbacks:
            callback.on_start(self)
        while self.step < until:
            self.step += 1
            self.clock.step(self.step)
            for callback in callbacks:
                callback.post_step(self, make_report(self.step))


def make_report(step: int) -> StepReport:
    """Loss 1/step."""
    loss, grad_norm = (torch.tensor(x, dtype=torch.float64) for x in (1 / step, 2.0 * step))
    return StepReport(step=step, loss=loss, grad_norm=grad_norm, lr=1e-3 * step, tokens=TOKENS_PER_STEP)


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., FakeTrainer]:
    """A trainer of a small model on 4 ranks, 10 steps, a log point every 2."""
    return lambda **changes: FakeTrainer(**({"run_dir": tmp_path} | changes))


@pytest.fixture
def report() -> Callable[[int], StepReport]:
    """Maker of step reports."""
    return make_report


@pytest.fixture
def values() -> Callable[..., dict[str, float]]:
    """Maker of the metrics of a log point."""
    return values_of


@pytest.fixture
def speed() -> dict[str, float]:
    """Metrics of time, which a log point has from the second step of a process on."""
    return SPEED
