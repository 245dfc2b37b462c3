"""Markdown tables and console lines of a benchmark: they format rows, and nothing reads them."""

from __future__ import annotations

import math

from based_megatron.bench.keys import Method, Quantity
from based_megatron.bench.report import Report, Row
from based_megatron.bench.timing import Timing


def to_markdown(report: Report) -> str:
    """The table, with what it was measured on above it."""
    lines = [f"# based bench {report.name}", "", *(f"- {key}: {value}" for key, value in report.facts.items()), ""]
    lines += [
        "Times are medians. `*` timed by events around calls, launches included, where the others replay CUDA graphs.",
        "Errors are relative L2 errors against fp64, on fresh random inputs.",
        "",
        "| what | sizes | value | target | floor | baselines | rates | errors (limit) | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        cells = (
            title(row),
            shape(row),
            _value(row),
            _target(row),
            "" if row.floor is None else number(row.floor),
            "<br>".join(f"{key.label}: {_baseline(value)}" for key, value in row.baselines.items()),
            "<br>".join(f"{number(value)} {key.label}" for key, value in row.rates.items()),
            "<br>".join(f"{name} {check.error:.1e} ({check.limit:.0e})" for name, check in row.checks.items()),
            " ".join(filter(None, ["" if row.passed else "**FAILED**", row.note])),
        )
        lines.append(table_line(*cells))
    for failure in report.failures:
        lines.append(table_line(failure.case, "", failure.error, "", "", "", "", "", "**FAILED**"))
    return "\n".join(lines) + "\n"


def summary(row: Row) -> str:
    """The row in one line, for the console."""
    parts = [f"{title(row):38} {shape(row):34}", f"{_value(row):>15}"]
    parts += [_target(row)] if row.target else []
    parts += [f"{key.label} {_baseline(value)}" for key, value in row.baselines.items()]
    parts += [f"{number(value)} {key.label}" for key, value in row.rates.items()]
    parts += [f"{name} {check.error:.1e}" for name, check in row.checks.items()]
    return "  ".join([*parts, "" if row.passed else "FAILED"]).rstrip()


def title(row: Row) -> str:
    """Operation and passes, such as `Taylor attention, forward + backward`."""
    return row.operation.label + (f", {row.passes.label}" if row.passes else "")


def shape(row: Row) -> str:
    """Model and sizes, such as `based-1b B8 T2048`."""
    return f"{row.model} {row.sizes}".strip()


def number(value: float) -> str:
    """A number with three digits: 0.0752, 17.8, 54,517."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table_line(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(row: Row) -> str:
    star = "*" if row.method is Method.EVENTS and row.quantity is Quantity.MILLISECONDS else ""
    return f"{number(row.value)}{star} {row.quantity.label}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    sign = "<=" if row.target.kind == "at most" else ">="
    return f"{sign} {number(row.target.value)}{' met' if row.target.met(row.value) else ' **missed**'}"


def _baseline(value: Timing | float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Timing):
        return number(value.ms) + ("*" if value.method is Method.EVENTS else "")
    return number(value)
