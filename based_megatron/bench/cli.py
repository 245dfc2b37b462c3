"""The command `based bench`. What takes seconds to load is imported after the command line is read."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class BenchConfig:
    """Check kernels against fp64 and time them against baselines, in one run. Writes WHAT.md, WHAT.json and a plot."""

    what: Annotated[
        Literal["kernels", "prefill", "decode", "train"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WHAT"),
    ]
    """kernels: every kernel and its gradients. prefill, decode, train: whole models."""
    output: Path = Path("runs/bench")
    """Folder of the results."""
    only: str = ""
    """Run only the cases whose name has this text in it, in capitals or not."""
    quick: bool = False
    """Tiny sizes, that a CPU can run: shows that everything works, not how fast it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on: auto takes a GPU if there is one."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Kernels of ours to time: auto takes triton on a GPU, else the PyTorch references."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of activations and weights."""
    seed: int = 0
    """Seed of the random inputs."""


def main(argv: Sequence[str]) -> int:
    """Parse the command line, run, write; returns 1 if a check failed. A target that is missed is only shown."""
    config = tyro.cli(BenchConfig, args=list(argv), prog="based bench")
    from based_megatron.bench.run import run

    return run(config, shlex.join(["based", "bench", *argv]))
