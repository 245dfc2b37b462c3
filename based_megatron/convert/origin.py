"""Where the weights of an export come from: the step of a run, and what its files say of that step."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from based_megatron.checkpoint.full import Whole
from based_megatron.config.schema import DataConfig
from based_megatron.run_folder.files import EVENTS
from based_megatron.run_folder.json_lines import read_lines


@dataclass(frozen=True)
class Measured:
    """A value and the step of the run that it was measured at."""

    step: int
    value: float


@dataclass(frozen=True)
class Origin:
    """What is known of the training of an export's weights. Losses are mean nats a token."""

    step: int = 0
    tokens: int = 0
    """Tokens of all steps so far; 0 for weights that were not trained here."""
    sequence_length_tokens: int | None = None
    corpora: tuple[str, ...] = ()
    """Names of the data folders, with their weights in a mixture."""
    training_loss: float | None = None
    """Loss of the step itself."""
    validation_loss: Measured | None = None
    """The last one up to the step."""
    recall: Mapping[str, float] = field(default_factory=dict)
    """Perplexities and losses of recall, measured with the validation loss; by their names in docs/recall-probes.md."""


def origin_of(whole: Whole) -> Origin:
    """What a checkpoint, and the events of its run where they are there, say of its training."""
    step, tokens = int(whole.state["step"]), int(whole.state.get("tokens_seen", 0))
    if not tokens:
        return Origin(step)
    found = _Events(step)
    events = whole.path.resolve().parent.parent / EVENTS
    if events.is_file():
        for event in read_lines(events):
            found.read(event)
    return Origin(
        step=step,
        tokens=tokens,
        sequence_length_tokens=whole.config.data.sequence_length_tokens,
        corpora=tuple(_corpora(whole.config.data)),
        training_loss=found.training_loss,
        validation_loss=found.validation_loss,
        recall=found.recall,
    )


class _Events:
    """The last word of a run on one step. A step that a restart did again is there twice: the later one counts."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._recall: tuple[int, Mapping[str, float]] = (0, {})
        self.training_loss: float | None = None
        self.validation_loss: Measured | None = None

    @property
    def recall(self) -> Mapping[str, float]:
        """Recall of the validation that has given the loss."""
        step, scores = self._recall
        return scores if self.validation_loss is not None and step == self.validation_loss.step else {}

    def read(self, event: Mapping[str, Any]) -> None:
        step, kind = int(event.get("step", 0)), event.get("event")
        if kind == "steps" and step - len(event["loss"]) < self._step <= step:
            self.training_loss = float(event["loss"][self._step - step - 1])
        elif kind == "validation" and self._is_latest(step, self.validation_loss.step if self.validation_loss else 0):
            self.validation_loss = Measured(step, float(event["loss"]))
        elif kind == "recall" and self._is_latest(step, self._recall[0]):
            self._recall = step, dict(_recall(event))

    def _is_latest(self, step: int, known: int) -> bool:
        return known <= step <= self._step


def _recall(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("ar_ppl", "other_ppl"):
        if event.get(name) is not None:
            yield name, float(event[name])
    for name, loss in event.get("probes", {}).items():
        if loss is not None:
            yield name, float(loss)


def _corpora(data: DataConfig) -> Iterator[str]:
    if data.path:
        yield Path(data.path).name
    for source in data.sources:
        yield f"{Path(source.path).name} (weight {source.weight:g})"
