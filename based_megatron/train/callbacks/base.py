"""The hooks of the training loop. Logging, validation, checkpoints and sampling are callbacks; the loop knows none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Equal on every rank; tensors are scalars on the device, and reading them waits for it."""

    step: int
    """Steps done, this one included: 1 after the first."""
    loss: Tensor
    """Mean loss of the step's tokens, in nats, fp64."""
    grad_norm: Tensor
    """Global gradient norm before clipping, fp64; inf or nan if the step was skipped and no weight changed."""
    lr: float
    tokens: int
    """Tokens of this step, over all ranks."""


class Callback:
    """Does something besides training. Hooks run on every rank, in the order of the callbacks, the last two in the opposite one.

    All may use collectives but settle and on_error.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def on_gradients(self, trainer: Trainer) -> None:
        """Between backward and the update of each step: `trainer.gradients()` are reduced, and not yet clipped or checked."""

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        """After each optimizer step."""

    def pre_save(self, trainer: Trainer) -> None:
        """Before a checkpoint: what it must not be ahead of is written now."""

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        """After a validation, with its mean loss in nats."""

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        """When something is worth a record: a checkpoint, a skipped step, a stop, a sample."""

    def settle(self) -> None:
        """Wait for what still runs in the background of this rank, so that the files of the run are final."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or after a clean stop."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """After an exception; other ranks may be gone, so no collectives here."""
