"""Markdown of results: it formats typed rows, and nothing reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from based_megatron.bench.keys import Method
from based_megatron.bench.table import number, table_line
from benchmarks.sequence_parallel.results import Measured, Modelled, Results
from benchmarks.sequence_parallel.step_model import STATE_WAYS

Row = TypeVar("Row")


def to_markdown(results: Results, name: str) -> str:
    """All tables below the facts of the device that they were measured on."""
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in results.facts.items()), ""]
    lines += [
        f"Everything is in [{name}.json]({name}.json) with all digits. "
        f"`python -m benchmarks.sequence_parallel --measured {name}.json --name {name} --output FOLDER` "
        "models again and writes this page.",
        "L: tokens of a rank; P: ranks that share a sequence. Times are medians; `*` timed by events around calls, launches "
        "included, where the others replay CUDA graphs.",
    ]
    for title, table in (*_measured_tables(results.measured), *_modelled_tables(results.modelled)):
        if len(table) > 2:
            lines += ["", f"## {title}", "", *table]
    if results.failures:
        lines += ["", "## Failed", "", *(f"- {failure.case}: {failure.error}" for failure in results.failures)]
    return "\n".join(lines) + "\n"


def _measured_tables(measured: Measured) -> list[tuple[str, list[str]]]:
    return [
        (
            "Measured: all ranks as threads of one process, several documents, relative L2 errors against fp64",
            _table(
                ("layer", "way", "P", "sizes", "errors (limit)", "kB sent by a rank"),
                measured.checks,
                lambda row: (
                    row.layer.label,
                    row.way.label,
                    str(row.ranks),
                    str(row.sizes),
                    ", ".join(f"{name} {check.error:.1e} ({check.limit:.0e})" for name, check in row.checks.items()),
                    number(row.sent_kilobytes),
                ),
            ),
        ),
        (
            "Measured: parts of a rank, ms, by L",
            _pivot(
                ((f"{p.layer.label}: {p.part.label}", p.length_tokens, _time(p.ms, p.method)) for p in measured.parts),
            ),
        ),
        (
            "Measured: time between the start of an exchange and the wait for it, ms, by L (events, the host ahead)",
            _pivot((f"{c.layer.label}, {c.passes.label}", c.length_tokens, number(c.ms)) for c in measured.covers),
        ),
        (
            "Measured: computation of a rank for the exchange of one state, ms, by P",
            _pivot((work.way.label, work.ranks, _time(work.ms, work.method)) for work in measured.local_work),
        ),
        (
            "Measured: slowdown of kernels while a copy runs",
            _table(
                ("kernel", "L", "channels", "slowdown", "GB/s copied", "ms alone"),
                measured.slowdowns,
                lambda row: (
                    row.kernel.label,
                    str(row.length_tokens),
                    str(row.channels),
                    number(row.ratio),
                    number(row.copied_gigabytes_per_second),
                    number(row.alone_ms),
                ),
            ),
        ),
        (
            f"Measured: steps of a rank, {number(measured.parameters_millions or 0)} M parameters",
            _table(
                ("step", "passes", "L", "ms", "tok/s", "GiB peak", ""),
                measured.steps,
                lambda row: (
                    row.sharing.label + (", as a CUDA graph" if row.as_graph else ""),
                    row.passes.label,
                    str(row.length_tokens),
                    number(row.ms),
                    _optional(row.tokens_per_second),
                    _optional(row.peak_gib),
                    "; ".join(
                        filter(
                            None,
                            [
                                "all activations recomputed" if row.recomputed else "",
                                f"does not fit: in proportion to L{row.extrapolated_from_tokens}"
                                if row.extrapolated_from_tokens
                                else "",
                            ],
                        )
                    ),
                ),
            ),
        ),
    ]


def _modelled_tables(modelled: Modelled) -> list[tuple[str, list[str]]]:
    ways = [way.label for way in STATE_WAYS]
    return [
        (
            "Modelled: bytes that a rank sends for one layer in one pass, and their time on the links",
            _table(
                ("layer", "way", "P", "L", "us", "MB", "MB between nodes"),
                modelled.links,
                lambda row: (
                    row.layer.label,
                    row.way.label,
                    str(row.ranks),
                    str(row.length_tokens),
                    row.obstacle or _optional(row.us),
                    _optional(row.megabytes),
                    _optional(row.network_megabytes),
                ),
            ),
        ),
        (
            "Modelled: microseconds of exchanges that are not hidden, forward + backward",
            _table(
                ("layer", "P", "L", "exposed", "on the links", "cover forward", "cover backward", "own work"),
                modelled.exchanges,
                lambda row: (
                    row.layer.label,
                    str(row.ranks),
                    str(row.length_tokens),
                    number(row.exposed_us),
                    number(row.link_us),
                    number(row.cover_forward_us),
                    number(row.cover_backward_us),
                    number(row.own_work_us),
                ),
            ),
        ),
        (
            "Modelled: efficiency of whole steps, %",
            _table(
                (
                    "P", "L", "tokens of the sequence", "GPUs", *ways, "without gradients", "without jitter", "as CUDA graphs",
                    "ms alone", "ms for exchanges, own work, jitter", "ms of gradients exposed", "tok/s a GPU",
                    "tok/s as CUDA graphs",
                ),
                modelled.steps,
                lambda row: (
                    str(row.ranks),
                    str(row.length_tokens),
                    f"{row.sequence_tokens:,}",
                    str(row.gpus),
                    *(number(row.efficiency_percent[way]) for way in STATE_WAYS),
                    number(row.percent_without_gradients),
                    number(row.percent_without_jitter),
                    _optional(row.percent_as_graph),
                    number(row.alone_ms),
                    number(row.exchanges_ms),
                    number(row.gradients_exposed_ms),
                    number(row.tokens_per_second),
                    _optional(row.tokens_per_second_as_graph),
                ),
            ),
        ),
    ]  # fmt: skip


def _table(names: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]) -> list[str]:
    return [table_line(*names), "|" + "---|" * len(names), *(table_line(*cells(row)) for row in rows)]


def _pivot(cells: Iterable[tuple[str, int, str]]) -> list[str]:
    """A line for each name, a column for each number."""
    found = {(name, column): text for name, column, text in cells}
    names, columns = dict.fromkeys(name for name, _ in found), sorted({column for _, column in found})
    return _table(
        ("", *map(str, columns)),
        list(names),
        lambda name: (name, *(found.get((name, column), "") for column in columns)),
    )


def _time(ms: float, method: Method) -> str:
    return number(ms) + ("*" if method is Method.EVENTS else "")


def _optional(value: float | None) -> str:
    return "" if value is None else number(value)
