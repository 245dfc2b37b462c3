"""What an evaluation found, as eval.json and eval.md."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from based_megatron.bench.report import plain
from based_megatron.bench.table import table_line


@dataclass(frozen=True)
class Slice:
    """The rows of a task that have something in common."""

    name: str
    rows: int
    contains: float
    no_context: float
    """`contains` of the same model without the document."""


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task, and what one must know to compare them."""

    task: str
    version: str
    """Version of the prompts and the metric."""
    rows: int
    metrics: Mapping[str, float]
    data: str
    """Where the rows come from."""
    data_hash: str
    """Start of the sha256 over the rows."""
    prompt_hash: str
    """Start of the sha256 over the prompts."""
    prompt: str = ""
    """What was done to the prompts: nothing, windows of so many tokens around the answer, documents read twice."""
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)
    slices: Sequence[Slice] = ()
    computed_tokens: int = 0
    """Tokens that the model computed, over all ranks."""
    alone_tokens: int = 0
    """Tokens of all requests, shared contexts counted each time."""
    seconds: float = 0.0
    """Wall time in the model: without the making of rows and prompts."""


@dataclass(frozen=True)
class Report:
    """An evaluation."""

    facts: Mapping[str, str]
    results: Sequence[TaskResult]


def write(report: Report, folder: Path) -> list[Path]:
    """Write eval.json and eval.md; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "eval.json", folder / "eval.md"
    data.write_text(json.dumps(plain(report), indent=1) + "\n")
    page.write_text(to_markdown(report))
    return [data, page]


def to_markdown(report: Report) -> str:
    """The page: one row for each task, and one table of slices."""
    lines = ["# based eval", "", *(f"- {name}: {value}" for name, value in report.facts.items()), ""]
    lines += _table(
        (
            "task",
            "version",
            "prompt",
            "rows",
            "score",
            "baselines",
            "data",
            "prompts",
            "tokens computed",
            "of",
            "seconds",
        ),
        [
            (
                result.task,
                result.version,
                result.prompt,
                str(result.rows),
                "<br>".join(f"{name} {_score(result, name)}" for name in result.metrics),
                "<br>".join(f"{name} {number(value)}" for name, value in result.baselines.items()),
                f"{result.data}<br>`{result.data_hash}`",
                f"`{result.prompt_hash}`",
                f"{result.computed_tokens:,}",
                f"{result.alone_tokens:,}",
                f"{result.seconds:.1f}",
            )
            for result in report.results
        ],
    )
    lines += [
        "",
        "`of`: tokens of all requests, contexts counted once for each request. Baselines: `no context` is the same model without the "
        "document, `majority` answers the most common value of the key. What a score is above both of them was read in the document.",
    ]
    sliced = [(result, each) for result in report.results for each in result.slices]
    if sliced:
        rows = [
            (result.task, each.name, str(each.rows), number(each.contains), number(each.no_context))
            for result, each in sliced
        ]
        lines += ["", *_table(("task", "rows with", "rows", "contains", "no context"), rows)]
    return "\n".join(lines) + "\n"


def summary(result: TaskResult) -> str:
    """The result in one line, for the console."""
    scores = "  ".join(f"{name} {_score(result, name)}" for name in result.metrics)
    baselines = "  ".join(f"{name} {number(value)}" for name, value in result.baselines.items())
    baselines = f"  ({baselines})" if baselines else ""
    shares = f"{result.computed_tokens:,} of {result.alone_tokens:,} tokens computed, {result.seconds:.1f} s"
    name = f"{result.task} {result.prompt}".strip()
    return f"{name:28} {result.rows:6} rows  {scores}{baselines}  {shares}"


def number(value: float) -> str:
    """Four significant digits, trailing zeros kept."""
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 10 else f"{value:.5g}"


def _score(result: TaskResult, name: str) -> str:
    error = result.standard_errors.get(name)
    return number(result.metrics[name]) + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [table_line(*head), "|" + "---|" * len(head), *(table_line(*row) for row in rows)]
