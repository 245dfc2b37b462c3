"""Tokens per second, MFU and where the time of a step goes, over the steps between two log points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from based_megatron.config import Config
from based_megatron.monitor.flops import peak_flops

if TYPE_CHECKING:
    from based_megatron.train.callbacks.base import StepReport


@dataclass(frozen=True)
class Throughput:
    """Means over an interval."""

    tokens_per_second: float
    """Over all ranks."""
    tokens_per_second_per_device: float
    mfu: float | None
    """Share of the devices' peak FLOP/s that the model's operations took; None if the peak is not known."""
    step_seconds: float
    data_seconds: float
    """Wait for data; like the next two, a part of step_seconds."""
    forward_backward_seconds: float
    optimizer_seconds: float


class ThroughputMeter:
    """Adds up steps. The first step of a process compiles and allocates, so it is left out.

    Only the time inside steps counts: validation, checkpoints and logging do not lower the tokens per second.
    """

    def __init__(self, flops_per_token: float, world_size: int, peak_flops_per_device: float | None) -> None:
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._peak_flops_per_device = peak_flops_per_device
        self._warm = False
        self._clear()

    def add(self, report: StepReport) -> None:
        """Count a step."""
        if not self._warm:
            self._warm = True
            return
        self._steps += 1
        self._tokens += report.tokens
        for part in self._seconds:
            self._seconds[part] += report.seconds.get(part, 0.0)

    def take(self) -> Throughput | None:
        """The means since the last call, and start over; None if no step was counted."""
        steps, tokens, seconds = self._steps, self._tokens, self._seconds
        self._clear()
        if not steps or seconds["total"] <= 0:
            return None
        tokens_per_second = tokens / seconds["total"]
        per_device = tokens_per_second / self._world_size
        peak = self._peak_flops_per_device
        return Throughput(
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_device=per_device,
            mfu=per_device * self._flops_per_token / peak if peak else None,
            step_seconds=seconds["total"] / steps,
            data_seconds=seconds["data"] / steps,
            forward_backward_seconds=seconds["forward_backward"] / steps,
            optimizer_seconds=seconds["optimizer"] / steps,
        )

    def _clear(self) -> None:
        self._steps = 0
        self._tokens = 0
        self._seconds = dict.fromkeys(("total", "data", "forward_backward", "optimizer"), 0.0)


def peak_flops_of_run(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one device: the configured one, else a known GPU's in bf16, else None."""
    if config.monitor.peak_flops > 0:
        return config.monitor.peak_flops
    if device.type != "cuda" or config.train.precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
