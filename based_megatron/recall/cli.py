"""The command `based recall`. What takes seconds to load is imported after the command line is read."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based_megatron.config.limits import Range, check_limits, flag


@dataclass(frozen=True)
class RecallConfig:
    """Measure how well mixers recall, over the bytes of their states (MQAR). Goes on where the folder's results end; writes recall.md,
    recall.json and recall.svg of all that the folder has."""

    preset: Literal["auto", "figure", "tiny"] = "auto"
    """figure: the task of the Based paper, for a GPU. tiny: minutes on two CPU cores. auto: figure if there is a GPU."""
    systems: str = ""
    """Systems to run, by name and separated by commas. Empty: all of the preset, or only what --pattern or --mixers name."""
    only: str = ""
    """Run only points whose name has this text in it."""
    pattern: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Layer pattern of the product's own model (with its MLPs and positions), such as cLS; may be repeated."""
    mixers: str = ""
    """Modules with mixers of your own, separated by commas: each becomes a system by its name, and --pattern may use its letter."""
    mixer_options: tuple[str, ...] = ()
    """Settings of mixers of your own, and of those in --pattern: words NAME.KEY=VALUE."""
    output: Path = Path("runs/recall")
    """Folder of the results."""
    minutes: Annotated[float, Range(at_least=0)] = 0.0
    """Stop after so many minutes; the next start goes on. 0: run to the end."""
    workers: Annotated[int, Range(at_least=0, at_most=256)] = 0
    """Processes that train at the same time. 0: as many as cores on a CPU, 4 on each GPU."""
    seeds: Annotated[int, Range(at_least=1)] = 1
    """Seeds of each point: 0, 1, ..."""
    epochs: Annotated[int, Range(at_least=0)] = 0
    """Epochs of each run. 0: those of the preset."""
    faithful: bool = False
    """Train as Zoology does: segments in order and never shuffled, 32 epochs, every rate to the end."""
    fresh: bool = False
    """Draw new training examples in every epoch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on: auto takes a GPU if there is one."""
    compile: bool = True
    """On a GPU, train layers that are plain PyTorch through torch.compile: the elementwise chains of a layer become a few kernels."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Kernels of the product's mixers: auto takes triton on a GPU, else the PyTorch references."""


def main(argv: Sequence[str]) -> int:
    """Parse the command line, run, write; returns 1 if a run failed. Raises BasedError for what a user can fix."""
    config = tyro.cli(RecallConfig, args=list(argv), prog="based recall")
    check_limits(config, flag)
    from based_megatron.recall.study import study

    return study(config, shlex.join(["based", "recall", *argv]))
