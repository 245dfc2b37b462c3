"""The results of a folder as JSON, a table and a picture: accuracy over the bytes of state, the published points next to ours."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from based_megatron.bench.pictures import svg_pyplot
from based_megatron.bench.report import plain
from based_megatron.bench.table import table_line
from based_megatron.recall.presets import Preset
from based_megatron.recall.published import PUBLISHED
from based_megatron.recall.sweep import best_rate, finished, study_key
from based_megatron.recall.systems import SYSTEMS, StateBytes

NAME = "recall"
OTHER_COLORS = ("#17becf", "#bcbd22", "#e377c2", "#9467bd")
MARKERS = "osD^vP*X<>hpd8H"


@dataclass(frozen=True)
class Measured:
    """A point of the study with all its seeds."""

    system: str
    point: str
    state_bytes: StateBytes
    parameters: int
    accuracy: Mapping[str, float]
    """Mean over seeds of the best rate's accuracy, by segment of the tests."""
    seeds: Sequence[float]
    """Mean accuracy of each seed."""
    rates: Sequence[float]
    """The best rate of each seed."""
    published: float | None
    """Accuracy that Zoology's figure shows at just these bytes."""

    @property
    def mean_accuracy(self) -> float:
        """Mean over segments and seeds."""
        return fmean(self.seeds)


@dataclass(frozen=True)
class Study:
    """Everything that a folder has measured of one task and recipe."""

    facts: Mapping[str, str]
    preset: Preset
    points: Sequence[Measured]
    runs: Sequence[Mapping[str, Any]]
    """Each run, with every rate."""


def write(folder: Path, preset_name: str, preset: Preset, command: str) -> list[Path]:
    """Write recall.json, recall.md and, where matplotlib is installed, recall.svg; returns what was written."""
    study = read_study(folder, preset_name, preset, command)
    if not study.points:
        return []
    paths = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    paths[0].write_text(json.dumps(plain(study), indent=1) + "\n")
    paths[1].write_text(to_markdown(study))
    try:
        draw(study, folder / f"{NAME}.svg")
    except ImportError:
        return paths
    return [*paths, folder / f"{NAME}.svg"]


def read_study(folder: Path, preset_name: str, preset: Preset, command: str) -> Study:
    """The finished runs of a folder that belong to one task and recipe, point by point."""
    key = study_key(preset)
    runs = [line for line in finished(folder).values() if line["study"] == key]
    runs.sort(key=lambda line: (_place(line["system"]), line["state_bytes"]["published"], line["point"], line["seed"]))
    points = [
        _measured([run for run in runs if run["point"] == name], with_published=preset_name == "figure")
        for name in dict.fromkeys(run["point"] for run in runs)
    ]
    minutes, cpu_minutes = (sum(run[field] for run in runs) / 60 for field in ("seconds", "cpu_seconds"))
    facts = {
        "preset": preset_name,
        "devices": ", ".join(sorted({run["device"] for run in runs})),
        "minutes of all runs": f"{minutes:.1f}, of the CPU {cpu_minutes:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command,
    }
    return Study(facts, preset, points, runs)


def _place(system: str) -> int:
    names = list(SYSTEMS)
    return names.index(system) if system in names else len(names)


def _measured(runs: Sequence[Mapping[str, Any]], with_published: bool) -> Measured:
    best, first = [best_rate(run) for run in runs], runs[0]
    state = StateBytes(**first["state_bytes"])
    known = PUBLISHED[first["system"]].zoology if with_published and first["system"] in PUBLISHED else ()
    return Measured(
        system=first["system"],
        point=first["point"],
        state_bytes=state,
        parameters=first["parameters"],
        accuracy={name: fmean(rate["accuracy"][name] for rate in best) for name in best[0]["accuracy"]},
        seeds=[fmean(rate["accuracy"].values()) for rate in best],
        rates=[rate["rate"] for rate in best],
        published=dict(known).get(state.published),
    )


def title_of(system: str) -> str:
    """A system in words."""
    return SYSTEMS[system].title if system in SYSTEMS else system


def to_markdown(study: Study) -> str:
    """A table of all points, and how they were measured."""
    task, recipe = study.preset.task, study.preset.recipe
    segments = [segment.name for segment in task.test]
    header = ["system", "point", "state", "without convs", "kept here", "accuracy", *segments, "published", "rate"]
    rows = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for point in study.points:
        state = point.state_bytes
        spread = f" ± {(max(point.seeds) - min(point.seeds)) / 2:.3f}" if len(point.seeds) > 1 else ""
        rows.append([
            title_of(point.system), point.point, f"{state.published:,}", f"{state.recurrent:,}",
            "grows" if state.product is None else f"{state.product:,}", f"**{point.mean_accuracy:.3f}**{spread}",
            *(f"{point.accuracy[name]:.3f}" for name in segments),
            "" if point.published is None else f"{point.published:.3f}", " ".join(f"{rate:.2g}" for rate in point.rates),
        ])  # fmt: skip
    table = "\n".join(table_line(*row) for row in rows)
    train = ", ".join(f"{segment.examples:,} of {segment.name}" for segment in task.train)
    facts = "\n".join(f"- {name}: {value}" for name, value in study.facts.items())
    return f"""# Recall: accuracy of MQAR over bytes of state

{table}

Bytes are those of one sequence between two tokens, in fp32. State: the recurrent states and three inputs a channel of the convolution in
front, as Zoology counts them. Without convs: as the Based paper's Figure 2 counts them. Kept here: all tensors that this product decodes
with, among them buffered keys and the inputs of short convolutions inside mixers. What grows with the sequence is counted at
{task.longest_tokens} tokens.

Accuracy: mean over the columns length/pairs, whose queries are right if the most likely of {task.vocab_size:,} tokens is the answer.
Published: Zoology's figure at the same bytes.

Trained on {train} examples, up to {recipe.epochs} epochs of batches of {recipe.batch_examples}, at rates
{", ".join(f"{rate:.2g}" for rate in recipe.rates)}; the best rate counts. {len(study.runs)} runs.

{facts}
"""


def draw(study: Study, path: Path) -> None:
    """Left, accuracy over bytes of state; right, accuracy by number of pairs. Raises ImportError without matplotlib."""
    pyplot = svg_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained", width_ratios=(3, 2))
    systems = list(dict.fromkeys(point.system for point in study.points))
    middle = median(math.log2(point.state_bytes.published) for point in study.points)
    for system in systems:
        points = sorted(
            (point for point in study.points if point.system == system), key=lambda point: point.state_bytes.published
        )
        color, marker = _color(system, systems), MARKERS[_place(system) % len(MARKERS)]
        x = [point.state_bytes.published for point in points]
        left.plot(x, [point.mean_accuracy for point in points], marker + "-", color=color, label=title_of(system))
        if study.facts["preset"] == "figure" and system in PUBLISHED:
            _draw_published(left, system, color)
        nearest = min(points, key=lambda point: abs(math.log2(point.state_bytes.published) - middle))
        _draw_by_pairs(right, nearest, color, marker)
    left.set_xscale("log", base=2)
    left.set(xlabel="bytes of state", ylabel="accuracy", ylim=(-0.03, 1.03), title="MQAR over state")
    right.set_xscale("log", base=2)
    right.set(xlabel="pairs", ylim=(-0.03, 1.03), title=f"by pairs, at the state nearest to {2**middle / 1000:.3g} kB")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    left.legend(fontsize=8, loc="best", title="band: published" if study.facts["preset"] == "figure" else None)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _color(system: str, systems: Sequence[str]) -> str:
    if system in SYSTEMS:
        return SYSTEMS[system].color
    others = [name for name in systems if name not in SYSTEMS]
    return OTHER_COLORS[others.index(system) % len(OTHER_COLORS)]


def _draw_published(panel: Any, system: str, color: str) -> None:
    """Both published figures as faint points, and a band between the lowest and the highest of each octave."""
    points = [*PUBLISHED[system].zoology, *PUBLISHED[system].paper]
    panel.plot(*zip(*points, strict=True), ".", color=color, alpha=0.45, markersize=5)
    octaves: dict[int, list[float]] = {}
    for nbytes, accuracy in points:
        octaves.setdefault(round(math.log2(nbytes)), []).append(accuracy)
    x = sorted(octaves)
    if len(x) > 1:
        low, high = ([pick(octaves[octave]) for octave in x] for pick in (min, max))
        panel.fill_between([2.0**octave for octave in x], low, high, color=color, alpha=0.1, linewidth=0)


def _draw_by_pairs(panel: Any, point: Measured, color: str, marker: str) -> None:
    """One point of a system: mean accuracy of segments with each number of pairs."""
    by_pairs: dict[int, list[float]] = {}
    for name, accuracy in point.accuracy.items():
        by_pairs.setdefault(int(name.partition("/")[2]), []).append(accuracy)
    x = sorted(by_pairs)
    panel.plot(x, [fmean(by_pairs[pairs]) for pairs in x], marker + "-", color=color, label=point.point)
    panel.legend(fontsize=7)
