import dataclasses
from types import SimpleNamespace

import pytest
import torch

from based_megatron.config import Config, MonitorConfig, TrainConfig
from based_megatron.monitor import throughput as module
from based_megatron.monitor.progress import PhaseTime
from based_megatron.monitor.throughput import ThroughputMeter, peak_flops_of_run


@pytest.fixture
def wall(monkeypatch) -> list[float]:
    """The time on the wall, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def meter(wall) -> ThroughputMeter:
    return ThroughputMeter(flops_per_token=1e3, world_size=4, peak_flops_per_device=1e6)


def test_nothing_is_known_before_a_step(meter):
    assert meter.take({"total": 0.0}, {}) == {}


def test_what_came_before_a_restart_is_left_out(meter, wall):
    meter.add(512)
    wall[0] = 100.0
    meter.restart()
    meter.add(512)
    wall[0] = 102.0
    values = meter.take({"total": 2.0}, {})
    assert values["throughput/tokens_per_second"] == 256.0 and values["throughput/goodput"] == 1.0


def test_rates_and_mfu(meter, wall):
    for _ in range(2):
        meter.add(512)
    wall[0] = 8.0
    values = meter.take({"total": 4.0}, {})
    assert values["throughput/tokens_per_second"] == 2 * 512 / 4.0
    assert values["throughput/tokens_per_second_per_device"] == 64.0
    assert values["throughput/mfu"] == pytest.approx(256 * 1e3 / (4 * 1e6))
    assert values["throughput/goodput"] == 0.5, "half of the 8 s were saves and validation"


def test_parts_of_a_step_are_means(meter, wall):
    for _ in range(3):
        meter.add(512)
    wall[0] = 12.0
    values = meter.take({"total": 12.0, "data": 3.0, "forward_backward": 6.0, "optimizer": 1.5}, {})
    assert [values[f"time/{part}_seconds"] for part in ("step", "data", "forward_backward", "optimizer")] == [
        4.0, 1.0, 2.0, 0.5
    ]  # fmt: skip


def test_steps_that_changed_nothing_are_no_goodput(meter, wall):
    for _ in range(4):
        meter.add(512)
    meter.skip()
    wall[0] = 8.0
    assert meter.take({"total": 8.0}, {})["throughput/goodput"] == 0.75


def test_each_interval_starts_over(meter, wall):
    for _ in range(2):
        meter.add(512)
    meter.skip()
    wall[0] = 4.0
    meter.take({"total": 4.0}, {})
    meter.add(100)
    wall[0] = 14.0
    values = meter.take({"total": 10.0}, {})
    assert values["throughput/tokens_per_second"] == 10.0 and values["throughput/goodput"] == 1.0
    assert meter.take({"total": 0.0}, {}) == {}


def test_where_the_time_of_a_process_goes(meter, wall, monkeypatch):
    """Two intervals: 4 steps of 2 s, of which 0.5 s wait for data and one changes nothing; a save of 5 s, a validation of 3 s."""
    process = SimpleNamespace(create_time=lambda: 1000.0)
    monkeypatch.setattr(module.psutil, "Process", lambda: process)
    monkeypatch.setattr(module.time, "time", lambda: 1060.0)
    meter.restart()
    for _ in range(4):
        meter.add(512)
    meter.skip()
    wall[0] = 20.0
    meter.take(
        {"total": 8.0, "data": 2.0},
        {"save": PhaseTime(1, 5.0), "validation": PhaseTime(1, 3.0), "log": PhaseTime(1, 1.0)},
    )
    meter.add(512)
    wall[0] = 24.0
    values = meter.take({"total": 2.0, "data": 0.5}, {"save": PhaseTime(2, 1.0)})
    spent = {
        name.removeprefix("wall_seconds/"): value for name, value in values.items() if name.startswith("wall_seconds/")
    }
    assert spent == {
        "start_up": 60.0,
        "steps": 3 * 1.5 + 1.5,
        "data": 2.5,
        "skipped": 1.5,
        "validation": 3.0,
        "save": 6.0,
        "other": 4.0 + 1.0,
    }
    assert sum(spent.values()) == 60.0 + 24.0, "no second is missing or counted twice"
    assert values["throughput/goodput"] == 1.5 / 4.0, "waiting for data is no goodput"


def test_no_mfu_without_a_peak(wall):
    meter = ThroughputMeter(flops_per_token=1e3, world_size=4, peak_flops_per_device=None)
    meter.add(512)
    wall[0] = 2.0
    assert "throughput/mfu" not in meter.take({"total": 2.0}, {})


def test_peak_of_a_run_is_the_configured_one():
    config = Config(monitor=MonitorConfig(peak_flops=5.0))
    assert peak_flops_of_run(config, torch.device("cpu")) == 5.0


def test_peak_of_a_cpu_is_not_known():
    assert peak_flops_of_run(Config(), torch.device("cpu")) is None


def test_bf16_peak_is_not_used_for_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    config, device = Config(), torch.device("cuda", 0)
    assert peak_flops_of_run(config, device) == 989e12
    fp32 = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp32"))
    assert peak_flops_of_run(fp32, device) is None


def test_fp8_is_measured_by_the_peak_of_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    config = Config(train=TrainConfig(precision="fp8"))
    assert peak_flops_of_run(config, torch.device("cuda", 0)) == 989e12
