"""What a sink is: the end of the line for metrics and events, on the logging rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from based_megatron.config import Config


@dataclass(frozen=True)
class RunFacts:
    """A run as it begins, or goes on, on the logging rank."""

    config: Config
    run_dir: Path
    device: torch.device
    world_size: int
    step: int
    """Steps that an earlier process has done; 0 for a new run."""
    tokens_seen: int
    run_id: str
    """Id of the run, which it keeps at every start."""
    run_name: str
    training_tokens: int
    """Tokens of the training splits of all corpora."""
    tokens_read: int
    """Those of them that an epoch reads."""
    sources: tuple[str, ...] = ()
    """What the run reads of each source, from its first step to its last, in words."""


class Sink:
    """Writes what it is given. Calls come in order, from the logging rank; a subclass overrides those that it has a use for."""

    def start(self, run: RunFacts) -> None:
        """Open what is written to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a log point by name, such as `train/loss` (docs/metrics.md lists them)."""

    def steps(self, first_step: int, losses: Sequence[float], grad_norms: Sequence[float]) -> None:
        """Write the loss and the gradient norm of each step since the last call, at log points and before checkpoints."""

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Write that something happened: start, resume, validation, checkpoint, skip, ... (docs/metrics.md lists them)."""

    def text(self, step: int, name: str, text: str) -> None:
        """Write text that the model has generated."""

    def flush(self) -> None:
        """Make what was written outlive the process and the machine."""

    def close(self) -> None:
        """Flush and let go, after the end of a run or an error."""


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf beyond the range of a float."""
    return math.exp(loss) if loss < 700 else math.inf
