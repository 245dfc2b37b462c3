"""What keeps bad steps out of a run: it judges each step, counts those that were skipped, and says when to go back.

All that it decides by is in the checkpoint: a run that was killed decides as one that was not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from based_megatron.config import Config
from based_megatron.data.jumps import DataJumps
from based_megatron.train.skips import SkipCount
from based_megatron.train.spikes import HAS_RISEN, SpikeWindow, reasons

GUARD = "guard"
"""Entry of a checkpoint's state: what the guard decides by. Absent in older ones."""
NOT_FINITE = "the gradient is not finite"


@dataclass(frozen=True)
class Spike:
    """A step that was out of line and counts all the same."""

    step: int
    loss: float
    grad_norm: float
    reason: str


@dataclass(frozen=True)
class Return:
    """The wish to go back to a checkpoint."""

    latest_step: int
    """The checkpoint must be of this step or an earlier one."""
    reason: str


class Guard:
    """Judges the steps of a run. Equal on every rank."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._settings, self._limit_steps = config.guards, config.train.max_skipped_steps
        self._window = SpikeWindow(config.guards, device)
        self._unread: list[tuple[int, Tensor]] = []
        """Steps since the last `spikes`: the number of each, and its loss, norm and verdict on the device."""
        self._returned_to: int | None = None
        """Step of the last rollback, while no step after it was good."""
        self.skips, self.data, self.rollbacks = SkipCount(), DataJumps(), 0

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor | None:
        """Whether to skip a step although its gradient is finite, on the device; None if nobody asks."""
        return None if self._settings.spike == "off" else self._window.judge(loss, grad_norm)

    def settle(self, step: int, loss: Tensor, grad_norm: Tensor, applied: bool) -> None:
        """Note what became of a step that was judged. Nothing waits."""
        self.skips.add(applied)
        if applied:
            self._returned_to = None
            if self._settings.spike != "off":
                self._window.keep()
            if self._settings.spike == "record":
                self._unread.append((step, torch.cat([torch.stack([loss, grad_norm]), self._window.verdict])))

    def spikes(self) -> list[Spike]:
        """Spikes that were recorded since the last call. Waits for the device."""
        values = torch.stack([value for _, value in self._unread]).tolist() if self._unread else []
        found = [
            Spike(step, loss, norm, ", ".join(reasons(verdict)))
            for (step, _), (loss, norm, *verdict) in zip(self._unread, values, strict=True)
            if any(verdict)
        ]
        self._unread = []
        return found

    def reason(self, grad_norm: float) -> str:
        """Why the newest step was skipped. Waits for the device."""
        if self._settings.spike == "off" or not math.isfinite(grad_norm):
            return NOT_FINITE
        return ", ".join(reasons(self._window.verdict.tolist())) or NOT_FINITE

    def wants_return(self, step: int, reason: str) -> Return | None:
        """Whether the run cannot go on from here, after a step that was skipped for a reason."""
        if HAS_RISEN in reason:
            latest_step, why = step - self._settings.window_steps, f"{reason} (step {step})"
        elif self.skips.in_a_row >= self._limit_steps:
            latest_step = step - self.skips.in_a_row
            why = f"{self.skips.in_a_row} steps in a row were skipped up to step {step}: {reason}"
        else:
            return None
        if self._returned_to is not None:
            # Nothing good came of the last return: its checkpoint was bad already.
            latest_step = min(latest_step, self._returned_to - 1)
        return Return(latest_step, why)

    @property
    def may_return(self) -> bool:
        """Whether a rollback is allowed."""
        return self._settings.rollback and self.rollbacks < self._settings.max_rollbacks

    def returned(self, step: int, data_step: int, rollbacks: int) -> None:
        """Go on from the checkpoint of a step, whose state was restored, with the data of another step; rollbacks: so far."""
        self.data, self.rollbacks, self._returned_to = self.data.jump(step, data_step), rollbacks, step

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. Waits for the device."""
        return {
            "skips": {"in_a_row": self.skips.in_a_row, "total": self.skips.total},
            "rollbacks": self.rollbacks,
            "data_jumps": [list(jump) for jump in self.data.jumps],
            **self._window.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint has kept."""
        self.skips = SkipCount(**state["skips"])
        self.rollbacks, self.data = state["rollbacks"], DataJumps.read(state["data_jumps"])
        self._window.restore(state)
        self._unread = []


def skips_at_end(state: Mapping[str, Any]) -> int:
    """Steps skipped in a row up to the step of a checkpoint, by its state."""
    return state[GUARD]["skips"]["in_a_row"] if GUARD in state else 0
