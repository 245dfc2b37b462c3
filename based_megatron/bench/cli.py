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

from based_megatron.bench.report import Row, facts_of, summary, write_report
from based_megatron.bench.timing import Bench
from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.build import DTYPES
from based_megatron.parallel.topology import pick_device


@dataclass(frozen=True)
class BenchConfig:
    """Check kernels against fp64 and time them beside their peers, in one run. Writes WHAT.md, WHAT.json and a plot."""

    what: Annotated[
        Literal["kernels", "prefill", "decode", "train", "sequence-parallel"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WHAT"),
    ]
    """kernels: every kernel and its gradients. prefill, decode, train: whole models. sequence-parallel: the parts of a rank
    measured on one device, and many ranks modelled."""
    output: Path = Path("runs/bench")
    """Folder of the results."""
    only: str = ""
    """Run only the cases whose name has this text in it."""
    quick: bool = False
    """Tiny sizes, that a CPU can run: shows that everything works, not how fast it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run: auto takes a GPU if there is one."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Kernels of ours to time: auto takes triton on a GPU, else the PyTorch references."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of activations and weights."""
    seed: int = 0
    """Seed of the random inputs."""
    links: Path | None = None
    """sequence-parallel: YAML or JSON with parameters of the links between GPUs (bench/links.py); missing ones keep their defaults."""
    measured: tuple[Path, ...] = ()
    """sequence-parallel: JSON of earlier runs, whose measured times are taken instead of measuring; later files replace earlier ones."""


def main(argv: Sequence[str]) -> int:
    """Parse the command line, run, write; returns 1 if a check failed. A target that is missed is only shown."""
    argv = list(argv)
    config = tyro.cli(BenchConfig, args=argv, prog="based bench")
    for key in ("links", "measured"):
        if getattr(config, key) and config.what != "sequence-parallel":
            raise ConfigError(f"--{key} is read by `based bench sequence-parallel` only: drop --{key}")
    device = pick_device(config.device, 0)
    torch.manual_seed(config.seed)
    backend = resolve_backend(config.backend, device)
    bench = Bench(device, DTYPES[config.precision], backend, config.quick, config.seed, config.links, config.measured)
    module = importlib.import_module(f"based_megatron.bench.{config.what.replace('-', '_')}")
    cases = module.cases(bench)
    chosen = [case for case in cases if config.only in case.name]
    if not chosen:
        names = "; ".join(case.name for case in cases)
        raise ConfigError(f"--only {config.only!r} is in no case of `based bench {config.what}`: {names}")
    rows: list[Row] = []
    facts = facts_of(bench, shlex.join(["based", "bench", *argv]))
    facts |= module.facts(bench) if hasattr(module, "facts") else {}
    for case in chosen:
        for row in case.rows():
            rows.append(row)
            print(summary(row), flush=True)
        # What has been measured is kept, whatever ends the run.
        plot, draw = case is chosen[-1], getattr(module, "draw", None)
        written = write_report(rows, facts, config.output, config.what, plot, draw)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(*written, sep="\n")
    failed = [f"{row.work} {row.shape}".strip() for row in rows if not row.passed]
    if failed:
        print(f"based bench: failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
