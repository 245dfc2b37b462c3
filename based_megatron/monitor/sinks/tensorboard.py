"""TensorBoard logs in run_dir/tensorboard."""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from based_megatron.monitor.sinks.base import RunFacts, Sink, perplexity

FLUSH_SECONDS = 20
LAYOUT = {
    "at a glance": {
        "loss": ["Multiline", ["^train/loss_mean$", "^validation/loss$"]],
        "largest loss and gradient norm of a step": ["Multiline", ["^train/loss_max$", "^train/grad_norm_max$"]],
        "loss of the step": ["Multiline", ["^train/loss$"]],
        "gradient norm": ["Multiline", ["^train/grad_norm$"]],
        "skipped steps and rollbacks": ["Multiline", ["^train/(skipped_steps|rollbacks)$"]],
        "learning rate": ["Multiline", ["^train/lr$"]],
        "tokens per second": ["Multiline", ["^throughput/tokens_per_second$"]],
        "MFU and goodput": ["Multiline", ["^throughput/mfu$", "^throughput/goodput$"]],
        "step time of ranks": ["Multiline", ["^time/step_seconds"]],
    },
    "model": {
        "gradient norm by kind of layer": ["Multiline", ["^grad_norm/"]],
        "weight norm by kind of layer": ["Multiline", ["^weight_norm/"]],
        "RMS of the residual": ["Multiline", ["^residual_rms/"]],
        "norm of linear attention states": ["Multiline", ["^state_norm/"]],
        "smallest normaliser": ["Multiline", ["^smallest_normaliser/"]],
    },
    "data": {
        "loss of each source": ["Multiline", ["^source_loss/"]],
        "share of tokens without loss": ["Multiline", ["^data/masked_share$"]],
        "document length": ["Multiline", ["^data/document_tokens$"]],
        "wait for data": ["Multiline", ["^time/data_seconds"]],
    },
    "machine": {
        "seconds until the end": ["Multiline", ["^time/eta_seconds$"]],
        "where time went, in seconds": ["Multiline", ["^wall_seconds/"]],
        "parts of a step": ["Multiline", ["^time/(data|forward_backward|optimizer)_seconds$"]],
        "memory": ["Multiline", ["^memory/"]],
        "saves": ["Multiline", ["^time/save_seconds$", "^time/save_write_seconds$"]],
    },
}
"""Charts of the tab "Custom scalars": the run on one page. Tags are regular expressions."""


class TensorBoardSink(Sink):
    """Scalars at every log point and validation, and generated text.

    A run that resumes at step N hides the points after N that an earlier, killed run has written.
    """

    def start(self, run: RunFacts) -> None:
        folder = str(run.run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=run.step + 1, flush_secs=FLUSH_SECONDS)
        self._writer.add_custom_scalars(LAYOUT)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, float(value), step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        if name == "validation":
            self.log(step, {"validation/loss": fields["loss"], "validation/perplexity": perplexity(fields["loss"])})

    def text(self, step: int, name: str, text: str) -> None:
        # Indented by four is preformatted in Markdown: generated text may hold any of its signs.
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
