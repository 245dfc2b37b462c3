"""The plot of `based bench sequence-parallel`: covers beside exchanges, and efficiency of many ranks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from based_megatron.bench.report import Row

AS_GRAPHS = "% as CUDA graphs"


def draw(rows: Sequence[Row], path: Path, facts: Mapping[str, str]) -> Path:
    """Above, what can hide a state and what it takes; below, weak and strong scaling. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Words as words: smaller, and the same bytes in every run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "based"})
    path = path.with_suffix(".svg")
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _covers(panels[0][0], rows)
    _exposed(panels[0][1], rows)
    _efficiency(panels[1][0], rows, by_sequence=False)
    _efficiency(panels[1][1], rows, by_sequence=True)
    figure.suptitle(
        f"One {facts['device']}, {facts['dtype']}: parts of a rank measured, links and other ranks modelled", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def sizes(row: Row) -> dict[str, int]:
    """{"P": 64, "L": 16384} of a row's shape."""
    return {letter: int(number) for letter, number in re.findall(r"\b([A-Z])(\d+)", row.shape)}


def _covers(panel: Any, rows: Sequence[Row]) -> None:
    """Measured covers over L, and the exchanges' time on the links as lines across."""
    for way, style in (("forward", "o-"), ("backward", "s-")):
        points = [(sizes(row)["L"], 1e3 * row.value) for row in rows if row.work == f"state: cover {way}"]
        if points:
            panel.plot(*zip(*sorted(points), strict=True), style, label=f"cover {way}, measured")
    states = {sizes(row)["P"]: row for row in rows if row.work == "link time of a linear attention layer's state"}
    for place, P in enumerate(P for P in states if P in (8, 64, 512)):
        panel.axhline(
            states[P].value, color="gray", linestyle=("-", "--", ":")[place % 3], label=f"state, P {P}, modelled"
        )
    panel.set(xlabel="tokens of a rank", ylabel="us", title="a layer's state, and what covers it")
    _finish(panel)


def _exposed(panel: Any, rows: Sequence[Row]) -> None:
    """Exchanges' share of a step, as the simulation has it."""
    lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row in _steps(rows):
        lines[sizes(row)["L"]].append(
            (
                sizes(row)["P"],
                100 * row.rates["ms for exchanges, own work and jitter"] / row.rates["ms of a rank alone"],
            )
        )
    for L, points in sorted(lines.items()):
        panel.plot(*zip(*sorted(points), strict=True), "o-", label=f"{L} tokens a rank")
    panel.set(xlabel="ranks", ylabel="% of the step of a rank alone", title="exchanges, jitter and own work, modelled")
    _finish(panel)


def _efficiency(panel: Any, rows: Sequence[Row], by_sequence: bool) -> None:
    """Steps launched one by one as lines, and replayed as CUDA graphs as dashes where they were measured."""
    lines: dict[int, list[Row]] = defaultdict(list)
    for row in _steps(rows):
        lines[round(row.rates["tokens of the sequence"]) if by_sequence else sizes(row)["L"]].append(row)
    for key, of_line in sorted(lines.items()):
        if len(of_line) < 2:
            continue
        of_line.sort(key=lambda row: sizes(row)["P"])
        (drawn,) = panel.plot(
            [sizes(row)["P"] for row in of_line], [row.value for row in of_line], "o-", label=f"{key // 1024}k tokens"
        )
        graphs = [(sizes(row)["P"], row.rates[AS_GRAPHS]) for row in of_line if AS_GRAPHS in row.rates]
        if graphs:
            panel.plot(*zip(*graphs, strict=True), "x--", color=drawn.get_color())
    if lines:
        panel.plot([], [], "x--", color="gray", label="as CUDA graphs")
    what = "strong scaling: the same sequence" if by_sequence else "weak scaling: tokens of a rank"
    panel.set(xlabel="ranks", ylabel="efficiency, %", title=f"{what}, modelled", ylim=(0, 102))
    _finish(panel, log_y=False)


def _steps(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.work == "training step, efficiency" and not row.failure]


def _finish(panel: Any, log_y: bool = True) -> None:
    if not panel.lines:
        panel.text(0.5, 0.5, "not in this run", ha="center", transform=panel.transAxes)
        return
    panel.set_xscale("log", base=2)
    if log_y:
        panel.set_yscale("log")
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7)
