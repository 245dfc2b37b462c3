"""The plot of results: covers and what they must hide, and efficiency of many ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from based_megatron.bench.keys import Passes
from based_megatron.bench.pictures import svg_pyplot
from benchmarks.sequence_parallel.results import Layer, Results, ScaledStep, Way

STATE_RANKS = (8, 64, 512)
"""Numbers of ranks whose time of a state on the links is drawn."""


def draw(results: Results, path: Path) -> None:
    """Above, what can hide a state and what it takes; below, weak and strong scaling. Raises ImportError without matplotlib."""
    pyplot = svg_pyplot()
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    one_job = [step for step in results.modelled.steps if step.gpus == step.ranks]
    _covers(panels[0][0], results)
    _exposed(panels[0][1], one_job)
    _efficiency(panels[1][0], one_job, "weak scaling: tokens of a rank", lambda step: step.length_tokens)
    _efficiency(panels[1][1], one_job, "strong scaling: the same sequence", lambda step: step.sequence_tokens)
    device, dtype = results.facts["device"], results.facts["dtype"]
    figure.suptitle(f"One {device}, {dtype}: parts of a rank measured, links and other ranks modelled", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _covers(panel: Any, results: Results) -> None:
    """Measured covers over L, and the exchanges' time on the links as lines across."""
    state = Layer.LINEAR_ATTENTION
    for passes, style in ((Passes.FORWARD, "o-"), (Passes.BACKWARD, "s-")):
        covers = (cover for cover in results.measured.covers if (cover.layer, cover.passes) == (state, passes))
        points = sorted((cover.length_tokens, 1e3 * cover.ms) for cover in covers)
        if points:
            panel.plot(*zip(*points, strict=True), style, label=f"cover {passes.label}, measured")
    links = [cost for cost in results.modelled.links if (cost.layer, cost.way) == (state, Way.AUTO)]
    for place, cost in enumerate(cost for cost in links if cost.ranks in STATE_RANKS):
        style = ("-", "--", ":")[place % 3]
        panel.axhline(cost.us, color="gray", linestyle=style, label=f"state, P {cost.ranks}, modelled")
    panel.set(xlabel="tokens of a rank", ylabel="us", title="a layer's state, and what covers it")
    _finish(panel)


def _exposed(panel: Any, steps: list[ScaledStep]) -> None:
    """Exchanges' share of a step, as the simulation has it."""
    for length_tokens, of_line in _lines(steps, lambda step: step.length_tokens):
        points = [(step.ranks, 100 * step.exchanges_ms / step.alone_ms) for step in of_line]
        panel.plot(*zip(*points, strict=True), "o-", label=f"{length_tokens} tokens a rank")
    panel.set(xlabel="ranks", ylabel="% of the step of a rank alone", title="exchanges, jitter and own work, modelled")
    _finish(panel)


def _efficiency(panel: Any, steps: list[ScaledStep], title: str, key: Callable[[ScaledStep], int]) -> None:
    """Steps launched one by one as lines, and replayed as CUDA graphs as dashes where they were measured."""
    for tokens, of_line in _lines(steps, key):
        if len(of_line) < 2:
            continue
        points = [(step.ranks, step.efficiency_percent[Way.AUTO]) for step in of_line]
        (drawn,) = panel.plot(*zip(*points, strict=True), "o-", label=f"{tokens // 1024}k tokens")
        graphs = [(step.ranks, step.percent_as_graph) for step in of_line if step.percent_as_graph is not None]
        if graphs:
            panel.plot(*zip(*graphs, strict=True), "x--", color=drawn.get_color())
    if steps:
        panel.plot([], [], "x--", color="gray", label="as CUDA graphs")
    panel.set(xlabel="ranks", ylabel="efficiency, %", title=f"{title}, modelled", ylim=(0, 102))
    _finish(panel, log_y=False)


def _lines(steps: list[ScaledStep], key: Callable[[ScaledStep], int]) -> list[tuple[int, list[ScaledStep]]]:
    """Steps of one key, by the number of ranks."""
    lines: dict[int, list[ScaledStep]] = defaultdict(list)
    for step in sorted(steps, key=lambda step: step.ranks):
        lines[key(step)].append(step)
    return sorted(lines.items())


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
