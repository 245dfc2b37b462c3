"""Steps whose loss or gradient norm is far above those of the steps before, found on the device: nothing waits for the host.

Losses and norms are compared as logarithms, by median and median deviation, which the spikes themselves hardly move.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.config import GuardsConfig

SMALLEST = 1e-30
"""Losses and norms below it are as good as zero, which has no logarithm."""
NORMAL = 1.4826
"""Standard deviation of normal numbers with median deviation 1."""
LEAST_DEVIATION = (0.01, 0.2)
"""Smallest deviations of the logarithms of loss and norm to go by: a window may be smoother than what comes after it."""
HAS_RISEN = "the loss has risen and stays"
REASONS = ("the loss is not finite", "the loss is a spike", "the gradient norm is a spike", HAS_RISEN)


class SpikeWindow:
    """The losses and norms of the last good steps, and the verdict on the newest one. Equal on every rank."""

    def __init__(self, settings: GuardsConfig, device: torch.device) -> None:
        self._settings = settings
        self._window = torch.empty(2, 0, dtype=torch.float64, device=device)
        """Logarithms of loss and norm, the oldest first."""
        self._lowest = torch.full((), math.inf, dtype=torch.float64, device=device)
        """Lowest median of a full window of losses."""
        self._point, self._verdict = self._window[:, :0], torch.zeros(len(REASONS), dtype=torch.bool, device=device)

    @property
    def judges(self) -> bool:
        """Whether enough good steps are known to judge by."""
        return self._window.shape[1] >= self._settings.warmup_steps

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the newest step must be skipped: a bool on the device. For each of REASONS the verdict is kept."""
        point = torch.stack([loss, grad_norm.to(loss.dtype)]).clamp(min=SMALLEST).log()
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Sums over other groups of ranks may differ in the last bit, and all ranks must decide alike.
            dist.broadcast(point, src=0)
        self._point = point
        is_nan = ~point[:1].isfinite()
        spikes = torch.zeros_like(point, dtype=torch.bool)
        has_risen = torch.zeros_like(is_nan)
        if self.judges:
            median, limit = self._limits()
            spikes = point > median + limit
            if self._settings.rollback and self._settings.spike == "skip" and self._is_full:
                has_risen = (median[0] > self._lowest + limit[0])[None]
        self._verdict = torch.cat([is_nan, spikes, has_risen])
        return self._verdict.any() if self._settings.spike == "skip" else self._verdict[0]

    @torch.no_grad()
    def keep(self) -> None:
        """Take the newest step, which was good, into the window."""
        self._window = torch.cat([self._window, self._point[:, None]], dim=1)[:, -self._settings.window_steps :]
        if self._is_full:
            self._lowest = torch.minimum(self._lowest, _median(self._window)[0])

    @property
    def verdict(self) -> Tensor:
        """For each of REASONS, whether it holds of the newest step: on the device."""
        return self._verdict

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. Waits for the device."""
        lowest = float(self._lowest)
        return {"window": self._window.tolist(), "lowest": lowest if math.isfinite(lowest) else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint has kept."""
        window = self._window.new_tensor(state["window"]).view(2, -1)
        self._window = window[:, -self._settings.window_steps :]
        self._lowest.fill_(math.inf if state["lowest"] is None else state["lowest"])

    @property
    def _is_full(self) -> bool:
        return self._window.shape[1] == self._settings.window_steps

    def _limits(self) -> tuple[Tensor, Tensor]:
        """Medians of the window, and how far above them is too far."""
        median = _median(self._window)
        deviation = NORMAL * _median((self._window - median[:, None]).abs())
        least = torch.stack([torch.full_like(median[0], value) for value in LEAST_DEVIATION])
        return median, self._settings.threshold * torch.maximum(deviation, least)


def reasons(verdict: Sequence[bool]) -> list[str]:
    """The reasons that hold, in words."""
    return [reason for reason, holds in zip(REASONS, verdict, strict=True) if holds]


def _median(values: Tensor) -> Tensor:
    """The lower median of each row. By sorting: torch.median is not deterministic on a GPU."""
    return values.sort(dim=1).values[:, (values.shape[1] - 1) // 2]
