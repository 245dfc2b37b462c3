"""Loss on held-out sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from based_megatron.data.batch import MicroBatch
from based_megatron.data.slices import NO_SLICE
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.step import LossSum

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


class Validator(Callback):
    """Runs the same held-out micro batches at every interval and at the end of the run."""

    def __init__(self, batches: Sequence[MicroBatch], pipeline_size: int) -> None:
        self._batches = fill_up(batches, pipeline_size)

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        interval_steps = trainer.config.validation.interval_steps
        if report.step % interval_steps == 0 or report.step == trainer.config.train.steps:
            with trainer.doing("validation"):
                found = trainer.step_runner.evaluate(self._batches)
                loss = float(found.mean)
            trainer.validated(loss)
            self.measured(trainer, found)

    def measured(self, trainer: Trainer, found: LossSum) -> None:
        """After each validation, with all that it has summed."""


def fill_up(batches: Sequence[MicroBatch], multiple: int) -> list[MicroBatch]:
    """Repeat the last micro batch, with an empty loss mask and in no slice, up to a multiple, which the interleaved schedule needs."""
    missing = -len(batches) % multiple
    last = batches[-1]
    no_slices_BL = None if last.slices_BL is None else torch.full_like(last.slices_BL, NO_SLICE)
    empty = replace(last, loss_mask_BL=torch.zeros_like(last.loss_mask_BL), slices_BL=no_slices_BL)
    return [*batches, *[empty] * missing]
