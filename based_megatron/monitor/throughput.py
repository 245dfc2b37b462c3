"""Tokens per second, MFU, goodput and where the time of a step goes, over the steps between two log points."""

import time
from collections.abc import Mapping

import torch

from based_megatron.config import Config
from based_megatron.monitor.flops import peak_flops


class ThroughputMeter:
    """Counts the steps between two log points and makes metrics of their time.

    Only the time inside steps counts for tokens per second: validation, checkpoints and logging do not lower it. Goodput is
    the share of all time that was spent in steps that changed the weights.
    """

    def __init__(self, flops_per_token: float, world_size: int, peak_flops_per_device: float | None) -> None:
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._peak_flops_per_device = peak_flops_per_device
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, after the first step of a process: it compiles and allocates."""
        self._steps = self._skipped = self._tokens = 0
        self._began = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count a step."""
        self._steps += 1
        self._tokens += tokens

    def skip(self) -> None:
        """Say of a counted step that it changed no weight."""
        self._skipped += 1

    def take(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the steps since the last call, which took so many seconds (a StepClock's), and start over; {} if there are none."""
        steps, tokens, useful = self._steps, self._tokens, self._steps - self._skipped
        wall_seconds = time.perf_counter() - self._began
        self.restart()
        if not steps or not seconds["total"]:
            return {}
        tokens_per_second = tokens / seconds["total"]
        per_device = tokens_per_second / self._world_size
        peak = self._peak_flops_per_device
        values = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_device": per_device,
            "throughput/goodput": min(1.0, seconds["total"] * useful / steps / wall_seconds),
            "time/step_seconds": seconds["total"] / steps,
            "time/data_seconds": seconds.get("data", 0.0) / steps,
            "time/forward_backward_seconds": seconds.get("forward_backward", 0.0) / steps,
            "time/optimizer_seconds": seconds.get("optimizer", 0.0) / steps,
        }
        if peak:
            values["throughput/mfu"] = per_device * self._flops_per_token / peak
        return values


def peak_flops_of_run(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one device: the configured one, else a known GPU's in bf16, else None."""
    if config.monitor.peak_flops > 0:
        return config.monitor.peak_flops
    if device.type != "cuda" or config.train.precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
