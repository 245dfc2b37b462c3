"""The command `based bench`."""

import importlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from based_megatron.bench.bars import draw_bars
from based_megatron.bench.report import Failure, Report, Row, facts_of
from based_megatron.bench.table import shape, summary, title, to_markdown
from based_megatron.bench.timing import Bench
from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.build import DTYPES
from based_megatron.parallel.topology import pick_device


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
    """Run only the cases whose name has this text in it."""
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
    argv = list(argv)
    config = tyro.cli(BenchConfig, args=argv, prog="based bench")
    device = pick_device(config.device, 0)
    torch.manual_seed(config.seed)
    backend = resolve_backend(config.backend, device)
    bench = Bench(device, DTYPES[config.precision], backend, config.quick, config.seed)
    cases = importlib.import_module(f"based_megatron.bench.{config.what}").cases(bench)
    chosen = [case for case in cases if config.only in case.name]
    if not chosen:
        names = "; ".join(case.name for case in cases)
        raise ConfigError(f"--only {config.only!r} is in no case of `based bench {config.what}`: {names}")
    rows: list[Row] = []
    failures: list[Failure] = []
    report = Report(config.what, facts_of(bench, shlex.join(["based", "bench", *argv])), rows, failures)
    for case in chosen:
        outcome = case.outcome()
        if isinstance(outcome, Failure):
            failures.append(outcome)
            print(f"{outcome.case:38} {outcome.error}  FAILED", flush=True)
        else:
            rows += outcome
            print(*map(summary, outcome), sep="\n", flush=True)
        # What has been measured is kept, whatever ends the run.
        written = write(report, config.output)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(*written, *draw(report, config.output), sep="\n")
    failed = [f"{title(row)} {shape(row)}".strip() for row in rows if not row.passed]
    failed += [failure.case for failure in failures]
    if failed:
        print(f"based bench: failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write(report: Report, folder: Path) -> list[Path]:
    """Write NAME.md and NAME.json; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / f"{report.name}.md", folder / f"{report.name}.json"
    markdown.write_text(to_markdown(report))
    data.write_text(report.to_json())
    return [markdown, data]


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw NAME.png where matplotlib is installed; returns what was written."""
    plot = folder / f"{report.name}.png"
    try:
        draw_bars(report, plot)
    except ImportError:
        return []
    return [plot]
