"""One run of `based bench`: choose cases, check and time them, write tables, numbers and a plot."""

import importlib
import sys
from pathlib import Path

import torch

from based_megatron.bench.bars import draw_bars
from based_megatron.bench.cli import BenchConfig
from based_megatron.bench.report import Failure, Report, Row, facts_of
from based_megatron.bench.table import shape, summary, title, to_markdown
from based_megatron.bench.timing import Bench
from based_megatron.errors import ConfigError
from based_megatron.kernels.backend import resolve_backend
from based_megatron.model.build import DTYPES
from based_megatron.parallel.topology import pick_device


def run(config: BenchConfig, command: str) -> int:
    """Check and time the cases that are chosen, write the report; returns 1 if a check failed.

    command: what was typed, for the report. Raises ConfigError if no case is chosen.
    """
    device = pick_device(config.device, 0)
    torch.manual_seed(config.seed)
    backend = resolve_backend(config.backend, device)
    bench = Bench(device, DTYPES[config.precision], backend, config.quick, config.seed)
    cases = importlib.import_module(f"based_megatron.bench.{config.what}").cases(bench)
    chosen = [case for case in cases if config.only.casefold() in case.name.casefold()]
    if not chosen:
        names = "; ".join(case.name for case in cases)
        raise ConfigError(f"--only {config.only!r} is in no case of `based bench {config.what}`: {names}")
    rows: list[Row] = []
    failures: list[Failure] = []
    report = Report(config.what, facts_of(bench, command), rows, failures)
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
