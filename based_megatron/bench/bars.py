"""Plots of a benchmark: bars of each row with marks for its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from based_megatron.bench.keys import Baseline
from based_megatron.bench.report import Report
from based_megatron.bench.table import shape, title
from based_megatron.bench.timing import Timing

MARKERS = "osD^vP*X"


def draw_bars(report: Report, path: Path) -> None:
    """Draw one panel for each quantity, on a logarithmic scale. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in report.rows if row.value > 0]
    quantities = list(dict.fromkeys(row.quantity for row in measured))
    heights = [sum(row.quantity is quantity for row in measured) for quantity in quantities]
    figure, panels = pyplot.subplots(
        len(quantities) or 1,
        squeeze=False,
        figsize=(10, 1.5 + 0.42 * sum(heights) + 0.6 * len(quantities)),
        height_ratios=heights or None,
        layout="constrained",
    )
    for (panel,), quantity in zip(panels, quantities, strict=False):
        rows = [row for row in measured if row.quantity is quantity]
        places = range(len(rows), 0, -1)
        panel.barh(places, [row.value for row in rows], height=0.5, color="tab:blue", label="measured")
        for i, key in enumerate(dict.fromkeys(key for row in rows for key in row.baselines)):
            values = [(baseline_value(row.baselines, key), place) for row, place in zip(rows, places, strict=True)]
            points = [(value, place) for value, place in values if value is not None]
            if points:
                panel.plot(*zip(*points, strict=True), MARKERS[i % len(MARKERS)], label=key.label, alpha=0.8)
        targets = [(row.target.value, place) for row, place in zip(rows, places, strict=True) if row.target]
        if targets:
            panel.plot(*zip(*targets, strict=True), "|", color="black", markersize=16, label="target")
        panel.set_yticks(list(places), [f"{title(row)}\n{shape(row)}" for row in rows], fontsize=7)
        panel.set_xscale("log")
        panel.set_xlabel(quantity.label)
        panel.grid(axis="x", alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(f"{report.facts['device']}, {report.facts['dtype']}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def baseline_value(baselines: Mapping[Baseline, Timing | float | str], key: Baseline) -> float | None:
    """A baseline's number; None if it gave none."""
    value = baselines.get(key, "")
    if isinstance(value, str):
        return None
    return value.ms if isinstance(value, Timing) else value
