"""Steps that were skipped because their gradient was not finite, counted without waiting for the device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Skip:
    """A step that changed no weight."""

    step: int
    loss: float
    in_a_row: int
    """Steps skipped up to this one, without one between that was not."""


class SkipCount:
    """Keeps the norms of steps on the device until somebody asks for them."""

    def __init__(self) -> None:
        self.in_a_row = 0
        """Skipped steps up to the last one that was read."""
        self._steps: list[int] = []
        self._unread: list[Tensor] = []

    @property
    def unread(self) -> int:
        """Steps since the last `read`."""
        return len(self._steps)

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Note a step, and read nothing."""
        self._steps.append(step)
        self._unread.append(torch.stack([loss, grad_norm]))

    def read(self) -> list[Skip]:
        """Skipped steps since the last call, in order. Waits for the device."""
        skips = []
        values = torch.stack(self._unread).tolist() if self._unread else []
        for step, (loss, grad_norm) in zip(self._steps, values, strict=True):
            self.in_a_row = 0 if math.isfinite(grad_norm) else self.in_a_row + 1
            if self.in_a_row:
                skips.append(Skip(step, loss, self.in_a_row))
        self._steps, self._unread = [], []
        return skips
