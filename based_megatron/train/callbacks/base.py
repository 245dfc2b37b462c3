"""The hooks of the training loop. Logging, validation, checkpoints and sampling are callbacks; the loop knows none of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer


@dataclass
class StepReport:
    """What one optimizer step did. Equal on every rank."""

    step: int
    """Steps done, this one included: 1 after the first."""
    loss: float
    """Mean loss of the step's tokens, in nats."""
    grad_norm: float
    """Global gradient norm before clipping; inf or nan if the step was skipped."""
    lr: float
    skipped: bool
    """True if the gradient was not finite and no weight changed."""
    tokens: int
    """Tokens of this step, over all ranks."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of this step on this rank: total, data, forward_backward, optimizer."""


class Callback:
    """Does something beside training. Hooks run on every rank, in the order of the callbacks; all may use collectives but on_error."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        """After each optimizer step."""

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        """After a validation, with its mean loss in nats."""

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        """Something worth a record: a checkpoint, a skipped step, a stop, a sample."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or after a clean stop."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """After an exception; other ranks may be gone, so no collectives here."""
