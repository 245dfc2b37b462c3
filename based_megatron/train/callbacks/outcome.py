"""Whether a run that has reached its last step has done what it was to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from based_megatron.errors import TrainingError
from based_megatron.train.callbacks.base import Callback

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Outcome(Callback):
    """Refuses to call a run done whose last steps were skipped: its weights are older than it says. They are saved before."""

    def on_end(self, trainer: Trainer) -> None:
        steps, skipped = trainer.config.train.steps, trainer.skips.in_a_row
        if trainer.step < steps or not skipped:
            return
        what = f"all {steps} steps were" if skipped == steps else f"the last {skipped} of {steps} steps were"
        raise TrainingError(
            f"{what} skipped: the weights are those of step {steps - skipped}; look at the skip events in events.jsonl, then raise "
            f"train.steps to go on, or start again with a lower optimizer.lr"
        )
