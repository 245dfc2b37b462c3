import dataclasses

import pytest
import torch

from based_megatron.config import Config, MonitorConfig
from based_megatron.monitor.throughput import ThroughputMeter, peak_flops_of_run


@pytest.fixture
def meter():
    return ThroughputMeter(flops_per_token=1e3, world_size=4, peak_flops_per_device=1e6)


def test_first_step_is_left_out(meter, report):
    meter.add(report(1))
    assert meter.take() is None
    meter.add(report(2))
    assert meter.take().step_seconds == 2.0


def test_first_step_of_a_resumed_process_is_left_out(meter, report):
    meter.add(report(500))
    assert meter.take() is None


def test_rates_and_mfu(meter, report):
    for step in (1, 2, 3):
        meter.add(report(step))
    speed = meter.take()
    assert speed.tokens_per_second == 2 * 512 / (2 * 2.0)
    assert speed.tokens_per_second_per_device == 64.0
    assert speed.mfu == pytest.approx(256 * 1e3 / (4 * 1e6))


def test_parts_of_a_step_are_means(meter, report):
    meter.add(report(1))
    for data_seconds in (0.25, 0.75, 2.0):
        parts = {"total": 4.0, "data": data_seconds, "forward_backward": 1.0, "optimizer": 0.5}
        meter.add(report(2, seconds=parts))
    speed = meter.take()
    assert (speed.step_seconds, speed.data_seconds) == (4.0, 1.0)
    assert (speed.forward_backward_seconds, speed.optimizer_seconds) == (1.0, 0.5)


def test_each_interval_starts_over(meter, report):
    for step in (1, 2):
        meter.add(report(step))
    meter.take()
    meter.add(report(3, tokens=100, seconds={"total": 10.0}))
    assert meter.take().tokens_per_second == 10.0
    assert meter.take() is None


def test_no_mfu_without_a_peak(report):
    meter = ThroughputMeter(flops_per_token=1e3, world_size=4, peak_flops_per_device=None)
    for step in (1, 2):
        meter.add(report(step))
    speed = meter.take()
    assert speed is not None and speed.mfu is None


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
