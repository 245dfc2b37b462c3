"""The command `based eval`. What takes seconds to load is imported after the command line is read."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based_megatron.config.limits import Range, check_limits, flag
from based_megatron.errors import CheckpointError, ConfigError

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that forbid libraries to download."""


@dataclass(frozen=True)
class EvalConfig:
    """Score a model on tasks of lm-eval and on recall tasks generated here. Writes eval.json, eval.md, rows and answers."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder (its newest valid checkpoint), a checkpoint, or a Hugging Face export."""
    tasks: str = "generated"
    """Groups and tasks, with commas between: generated (metadata, packages_html, phonebook), recall, commonsense, super-glue, ruler,
    any name that lm-eval knows, or that of a file of rows in --data."""
    limit: Annotated[int, Range(at_least=0)] = 0
    """Rows of each task, the first ones; 0: all."""
    data: Path | None = None
    """Folder with rows of tasks: TASK.jsonl, or a folder TASK with validation.jsonl and other splits."""
    offline: bool = False
    """Download nothing: a task without rows in --data is refused."""
    read_twice: bool = False
    """Put the document into the prompt twice, where the answer is sought in a document (JRT, arXiv 2407.05483)."""
    context: str = ""
    """Tokens of the documents, with commas between, such as 512,1024,2048: windows around the answer, or sizes of what is generated."""
    tokenizer: Path | None = None
    """Tokenizer folder or file. Default: that of the export, or of the data folder of the run."""
    mixers: str = ""
    """Modules of mixers that an export has and that are not ours, as in model.mixers."""
    batch: Annotated[int, Range(at_least=1)] = 32
    """Sequences that are computed at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of weights and activations."""
    device: str = ""
    """Device to run on, such as cpu or cuda. Default: a GPU if there is one."""
    output: Path = Path("runs/eval")
    """Folder of the results."""

    def contexts(self) -> tuple[int, ...]:
        """Tokens of the documents, in ascending order. Raises ConfigError."""
        try:
            found = sorted({int(part) for part in self.context.replace(",", " ").split()})
        except ValueError as error:
            raise ConfigError(f"--context {self.context!r} is no list of numbers: give 512,1024,2048") from error
        if found and found[0] < 1:
            raise ConfigError(f"--context {self.context!r} has a number below 1: give 512,1024,2048")
        return tuple(found)


def main(argv: Sequence[str]) -> None:
    """Parse the command line, evaluate, write. Every rank runs this; `based launch local --nproc N -- eval ...` starts several."""
    config = tyro.cli(EvalConfig, args=list(argv), prog="based eval")
    check_limits(config, flag)
    contexts = config.contexts()
    if not config.model.exists():
        raise CheckpointError(f"there is no {config.model}: give a run folder, a checkpoint or a Hugging Face export")
    from based_megatron.evaluation.tasks import chosen_tasks

    tasks = chosen_tasks(config.tasks.replace(",", " ").split(), config.data, config.offline)
    if config.offline:
        # Read when the libraries are imported, which this process does for this command alone.
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    from based_megatron.evaluation.run import run

    run(config, contexts, tasks, shlex.join(["based", "eval", *argv]))
