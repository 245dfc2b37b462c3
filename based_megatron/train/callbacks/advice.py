"""What a run should be told about what it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from based_megatron.train.callbacks.base import Callback

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Advice(Callback):
    """Records lines as warnings at the start."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines

    def on_start(self, trainer: Trainer) -> None:
        for line in self._lines:
            trainer.record("warning", message=line)
