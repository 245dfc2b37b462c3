"""TensorBoard logs in run_dir/tensorboard."""

import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from based_megatron.config import to_dict
from based_megatron.monitor.sinks.base import RunFacts, Sink, perplexity
from based_megatron.monitor.sinks.recall_image import recall_image

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
        "step time of ranks": ["Multiline", ["^time/step_seconds", "^time/own_seconds"]],
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
    "recall": {
        "perplexity of AR hits and of the rest": ["Multiline", ["^recall/(ar|other)_ppl$"]],
        "first occurrences minus repeats, by training count": ["Multiline", ["^recall/gain_by_count/"]],
        "AR hits by distance": ["Multiline", ["^recall/loss_by_distance/"]],
        "induction": ["Multiline", ["^recall/induction/"]],
        "multi-query associative recall": ["Multiline", ["^recall/mqar/"]],
        "share of AR hits": ["Multiline", ["^recall/ar_share$"]],
    },
    "machine": {
        "seconds until the end": ["Multiline", ["^time/eta_seconds$"]],
        "where time went, in seconds": ["Multiline", ["^wall_seconds/"]],
        "parts of a step": ["Multiline", ["^time/(data|forward_backward|optimizer)_seconds$"]],
        "memory": ["Multiline", ["^memory/"]],
        "saves": ["Multiline", ["^time/save_seconds$", "^time/save_write_seconds$"]],
        "skips, spikes, rollbacks, saves, warnings": ["Multiline", ["^events/"]],
    },
}
"""Charts of the tab "Custom scalars": the run on one page. Tags are regular expressions."""


EVENTS = {"skip": "skips", "spike": "spikes", "rollback": "rollbacks", "checkpoint": "saves", "warning": "warnings"}
"""Events that are counted, as `events/NAME`, from each start on."""
COMPARED = ("model", "data", "parallel", "optimizer", "schedule", "train")
"""Sections of settings that the tab "HParams" shows."""
RESULTS = ("train/loss_mean", "validation/loss", "throughput/tokens_per_second")
"""What the tab "HParams" compares runs by."""
BY_TOKENS = "by_tokens"


class TensorBoardSink(Sink):
    """Scalars at every log point and validation, events as counts, the settings and the command, and generated text.

    Losses are written once more over tokens in the place of steps, in a folder of their own. A run that resumes at step N hides the
    points after N that an earlier, killed run has written.
    """

    def start(self, run: RunFacts) -> None:
        folder = run.run_dir / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.step + 1, flush_secs=FLUSH_SECONDS)
        purge_tokens = run.tokens_seen + 1
        self._by_tokens = SummaryWriter(str(folder / BY_TOKENS), purge_step=purge_tokens, flush_secs=FLUSH_SECONDS)
        self._tokens, self._counts = run.tokens_seen, Counter[str]()
        self._writer.add_custom_scalars(LAYOUT)
        self.text(run.step, "run/command", shlex.join(["based", *sys.argv[1:]]))
        settings = to_dict(run.config)
        self.text(run.step, "run/config", yaml.safe_dump(settings, sort_keys=False))
        for summary in hparams(_plain({name: settings[name] for name in COMPARED}), dict.fromkeys(RESULTS)):
            self._writer._get_file_writer().add_summary(summary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tokens = int(values["train/tokens_seen"])
        self._scalars(step, values)
        if "train/loss_mean" in values:
            self._by_tokens.add_scalar(f"{BY_TOKENS}/loss_mean", values["train/loss_mean"], self._tokens)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        if name == "validation":
            loss = fields["loss"]
            self._scalars(step, {"validation/loss": loss, "validation/perplexity": perplexity(loss)})
            self._by_tokens.add_scalar(f"{BY_TOKENS}/validation_loss", loss, self._tokens)
        elif name == "recall":
            self._writer.add_image("recall/losses", recall_image(fields, step), step, dataformats="HWC")
        elif name in EVENTS:
            self._counts[name] += 1
            self._scalars(step, {f"events/{EVENTS[name]}": self._counts[name]})

    def text(self, step: int, name: str, text: str) -> None:
        # Indented by four is preformatted in Markdown: generated text may hold any of its signs.
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def flush(self) -> None:
        self._writer.flush()
        self._by_tokens.flush()

    def close(self) -> None:
        self._writer.close()
        self._by_tokens.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, float(value), step)


def _plain(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names from the top, as far as they are numbers, words or truths."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _plain(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            found[prefix + key] = value
    return found
