"""Tokens per second, MFU, goodput and where time goes: that of steps between two log points, and all of a process."""

import time
from collections.abc import Mapping

import psutil
import torch

from based_megatron.config import Config
from based_megatron.monitor.flops import peak_flops
from based_megatron.monitor.progress import PhaseTime

BETWEEN_STEPS = ("validation", "save")
"""Phases whose seconds have an entry of their own; all else between steps is `other`."""


class ThroughputMeter:
    """Counts the steps between two log points and makes metrics of their time.

    Only the time inside steps counts for tokens per second: validation, checkpoints and logging do not lower it. Goodput is
    the share of all time that computed steps that changed the weights; waiting for data is no part of it.
    """

    def __init__(self, flops_per_token: float, world_size: int, peak_flops_per_device: float | None) -> None:
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._peak_flops_per_device = peak_flops_per_device
        self.steps_in_all = 0
        """Steps whose time was taken so far: all of this process but the first."""
        self._spent = dict.fromkeys(("start_up", "steps", "data", "skipped", *BETWEEN_STEPS, "other"), 0.0)
        self._start_over()

    def restart(self) -> None:
        """Forget what was counted, after the first step of a process: it compiles and allocates. All before it was start-up."""
        self._spent["start_up"] = process_seconds()
        self._start_over()

    def add(self, tokens: int) -> None:
        """Count a step."""
        self._steps += 1
        self._tokens += tokens

    def skip(self) -> None:
        """Say of a counted step that it changed no weight."""
        self._skipped += 1

    def take(self, seconds: Mapping[str, float], phases: Mapping[str, PhaseTime]) -> dict[str, float]:
        """Metrics of the steps since the last call, and start over; {} if there are none.

        seconds: of the parts of these steps (a StepClock's). phases: what has ended since the last call.
        """
        steps, tokens, skipped_share = self._steps, self._tokens, self._skipped / max(1, self._steps)
        wall_seconds = time.perf_counter() - self._began
        self._start_over()
        if not steps or not seconds["total"]:
            return {}
        data_seconds = seconds.get("data", 0.0)
        computed = seconds["total"] - data_seconds
        spent = {"steps": computed * (1 - skipped_share), "data": data_seconds, "skipped": computed * skipped_share}
        spent |= {phase: phases[phase].seconds if phase in phases else 0.0 for phase in BETWEEN_STEPS}
        spent["other"] = max(0.0, wall_seconds - sum(spent.values()))
        for name, value in spent.items():
            self._spent[name] += value
        self.steps_in_all += steps
        tokens_per_second = tokens / seconds["total"]
        per_device = tokens_per_second / self._world_size
        peak = self._peak_flops_per_device
        values = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_device": per_device,
            "throughput/goodput": min(1.0, spent["steps"] / wall_seconds),
            "time/step_seconds": seconds["total"] / steps,
            "time/data_seconds": data_seconds / steps,
            "time/forward_backward_seconds": seconds.get("forward_backward", 0.0) / steps,
            "time/own_seconds": (data_seconds + seconds.get("own", 0.0)) / steps,
            "time/optimizer_seconds": seconds.get("optimizer", 0.0) / steps,
        }
        if peak:
            values["throughput/mfu"] = per_device * self._flops_per_token / peak
        return values | {f"wall_seconds/{name}": value for name, value in self._spent.items()}

    def _start_over(self) -> None:
        self._steps = self._skipped = self._tokens = 0
        self._began = time.perf_counter()


def process_seconds() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def peak_flops_of_run(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one device: the configured one, else a known GPU's in bf16 (also for fp8, to compare), else None."""
    if config.monitor.peak_flops > 0:
        return config.monitor.peak_flops
    if device.type != "cuda" or config.train.precision == "fp32":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
