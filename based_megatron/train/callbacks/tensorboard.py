"""TensorBoard logs in run_dir/tensorboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter

from based_megatron.monitor.memory import memory_gib
from based_megatron.monitor.throughput import Throughput
from based_megatron.train.callbacks.base import StepReport
from based_megatron.train.callbacks.metrics import MetricsLogger, perplexity

if TYPE_CHECKING:
    from based_megatron.train.trainer import Trainer

FLUSH_SECONDS = 20


class TensorBoardLogger(MetricsLogger):
    """Scalars at every log point and validation, generated text at every `sample` event.

    A run that resumes at step N hides the points after N that an earlier, killed run has written.
    """

    _writer: SummaryWriter | None = None

    def start(self, trainer: Trainer) -> None:
        self._writer = SummaryWriter(
            str(trainer.run_dir / "tensorboard"), purge_step=trainer.step + 1, flush_secs=FLUSH_SECONDS
        )

    def log(self, trainer: Trainer, report: StepReport, throughput: Throughput | None) -> None:
        scalars: dict[str, float] = {
            "train/loss": report.loss,
            "train/perplexity": perplexity(report.loss),
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "train/tokens_seen": trainer.tokens_seen,
        }
        if throughput:
            scalars |= {
                "throughput/tokens_per_second": throughput.tokens_per_second,
                "throughput/tokens_per_second_per_device": throughput.tokens_per_second_per_device,
                "time/step_seconds": throughput.step_seconds,
                "time/data_seconds": throughput.data_seconds,
                "time/forward_backward_seconds": throughput.forward_backward_seconds,
                "time/optimizer_seconds": throughput.optimizer_seconds,
            }
            if throughput.mfu is not None:
                scalars["throughput/mfu"] = throughput.mfu
        scalars |= {f"memory/{name}": value for name, value in memory_gib(trainer.device).items()}
        self._add(scalars, report.step)

    def on_validation(self, trainer: Trainer, loss: float) -> None:
        self._add({"validation/loss": loss, "validation/perplexity": perplexity(loss)}, trainer.step)

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        """`sample` has the fields prompt and text, the continuation; other events are not for TensorBoard."""
        if self._writer is not None and name == "sample":
            # Indented by four is preformatted in Markdown: generated text may hold any of its signs.
            text = "".join(f"    {line}\n" for line in f"{fields['prompt']}|{fields['text']}".splitlines())
            self._writer.add_text(f"sample/{fields['prompt']}", text, trainer.step)

    def on_end(self, trainer: Trainer) -> None:
        self._close()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._close()

    def _add(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
