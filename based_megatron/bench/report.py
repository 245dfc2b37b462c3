"""Rows of a benchmark, and the Markdown, JSON and plot that they are written to."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from based_megatron.bench.timing import Bench, Timing

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "fla-core",
    "liger-kernel",
    "flash-attn",
    "causal-conv1d",
)


@dataclass(frozen=True)
class Target:
    """What a measured value should be."""

    kind: Literal["at most", "at least"]
    value: float

    def met(self, measured: float) -> bool:
        return measured <= self.value if self.kind == "at most" else measured >= self.value


@dataclass(frozen=True)
class Check:
    """An error and the largest that passes. NaN never passes."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True)
class Row:
    """One line of the table: a measured value beside its target, its peers and its errors."""

    work: str
    """What is measured, such as `taylor forward`."""
    shape: str
    """Sizes and dtype, such as `B8 T2048 H16 F16 V64`."""
    value: float
    unit: str = "ms"
    target: Target | None = None
    floor: float | None = None
    """What the device cannot beat, in the unit of the value."""
    peers: Mapping[str, Timing | float | str] = field(default_factory=dict)
    """Name to the same measure of a peer in the unit of the value, or to why there is none."""
    checks: Mapping[str, Check] = field(default_factory=dict)
    """Name of an output or gradient to its relative error against fp64."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Other measures by unit, such as `GB/s`, `tok/s` or `GiB peak`."""
    source: Literal["measured", "modelled"] = "measured"
    """Whether the value was measured on this device, or follows from measured times and assumed links."""
    note: str = ""
    failure: str = ""
    """Why there is no value: the error of a case that raised."""

    @property
    def passed(self) -> bool:
        return not self.failure and all(check.passed for check in self.checks.values())

    @classmethod
    def failed(cls, work: str, error: Exception) -> Row:
        """The row of a case that raised."""
        return cls(work, "", math.nan, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


@dataclass(frozen=True)
class Case:
    """Rows that are measured together; one that raises does not stop the others."""

    name: str
    run: Callable[[], Row | Sequence[Row]]

    def rows(self) -> Iterator[Row]:
        try:
            found = self.run()
        except Exception as error:
            traceback.print_exc()
            yield Row.failed(self.name, error)
            return
        yield from [found] if isinstance(found, Row) else found


Draw = Callable[[Sequence[Row], Path, Mapping[str, str]], Path]
"""Draws rows to a file, with what they were measured on; returns the file. Raises ImportError without matplotlib."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected values, in fp64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def write_report(
    rows: Sequence[Row],
    facts: Mapping[str, str],
    folder: Path,
    name: str,
    plot: bool = True,
    draw: Draw | None = None,
) -> list[Path]:
    """Write NAME.md, NAME.json and, where matplotlib is installed, NAME.png (or what `draw` writes). Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / f"{name}.md", folder / f"{name}.json"
    markdown.write_text(to_markdown(rows, facts, name))
    data.write_text(json.dumps({"facts": dict(facts), "rows": [_plain(row) for row in rows]}, indent=1) + "\n")
    if not plot:
        return [markdown, data]
    try:
        return [markdown, data, (draw or draw_bars)(rows, folder / f"{name}.png", facts)]
    except ImportError:
        return [markdown, data]


def facts_of(bench: Bench, command: str) -> dict[str, str]:
    """What a reader must know to repeat the numbers."""
    versions = [f"{package} {version}" for package in PACKAGES if (version := _version(package))]
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(bench.dtype).removeprefix("torch."),
        "backend": bench.backend,
        "python": platform.python_version(),
        "packages": ", ".join(versions) + (f", CUDA {torch.version.cuda}" if on_gpu else ""),
        "command": command,
        **({"sizes": "tiny (--quick): the times mean nothing"} if bench.quick else {}),
    }


def to_markdown(rows: Sequence[Row], facts: Mapping[str, str], name: str) -> str:
    """The table, with what it was measured on above it."""
    lines = [f"# based bench {name}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += [
        "Times are medians. `*` timed by events around calls, launches included, where the others replay CUDA graphs.",
        "Errors are relative L2 errors against fp64, on fresh random inputs.",
        "",
        "| work | shape | value | source | target | floor | peers | rates | errors (limit) | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.work,
            row.shape,
            row.failure or f"{_number(row.value)} {row.unit}",
            "" if row.failure else row.source,
            _target(row),
            "" if row.floor is None else _number(row.floor),
            "<br>".join(f"{peer}: {_measure(value)}" for peer, value in row.peers.items()),
            "<br>".join(f"{_number(value)} {unit}" for unit, value in row.rates.items()),
            "<br>".join(f"{what} {check.error:.1e} ({check.limit:.0e})" for what, check in row.checks.items()),
            " ".join(filter(None, ["" if row.passed else "**FAILED**", row.note])),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def summary(row: Row) -> str:
    """The row in one line, for the console."""
    parts = [f"{row.work:34} {row.shape:34}", row.failure or f"{_number(row.value):>9} {row.unit:6}"]
    parts += [_target(row)] if row.target else []
    parts += [f"{peer} {_measure(value)}" for peer, value in row.peers.items()]
    parts += [f"{_number(value)} {unit}" for unit, value in row.rates.items()]
    parts += [f"{what} {check.error:.1e}" for what, check in row.checks.items()]
    return "  ".join([*parts, "" if row.passed else "FAILED"]).rstrip()


def draw_bars(rows: Sequence[Row], path: Path, facts: Mapping[str, str]) -> Path:
    """Bars of each row and its peers, one panel a unit, on a logarithmic scale. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if not row.failure and row.value > 0]
    units = list(dict.fromkeys(row.unit for row in measured))
    heights = [sum(row.unit == unit for row in measured) for unit in units]
    figure, panels = pyplot.subplots(
        len(units) or 1,
        squeeze=False,
        figsize=(10, 1.5 + 0.42 * sum(heights) + 0.6 * len(units)),
        height_ratios=heights or None,
        layout="constrained",
    )
    for (panel,), unit in zip(panels, units, strict=False):
        of_unit = [row for row in measured if row.unit == unit]
        peers = list(dict.fromkeys(peer for row in of_unit for peer in row.peers))
        places = range(len(of_unit), 0, -1)
        panel.barh(places, [row.value for row in of_unit], height=0.5, color="tab:blue", label="measured")
        for i, peer in enumerate(peers):
            points = [
                (_value(row.peers[peer]), place)
                for row, place in zip(of_unit, places, strict=True)
                if not isinstance(row.peers.get(peer, ""), str)
            ]
            if points:
                panel.plot(*zip(*points, strict=True), "osD^vP*X"[i % 8], label=peer, alpha=0.8)
        targets = [(row.target.value, place) for row, place in zip(of_unit, places, strict=True) if row.target]
        if targets:
            panel.plot(*zip(*targets, strict=True), "|", color="black", markersize=16, label="target")
        panel.set_yticks(list(places), [f"{row.work}\n{row.shape}" for row in of_unit], fontsize=7)
        panel.set_xscale("log")
        panel.set_xlabel(unit)
        panel.grid(axis="x", alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(f"{facts['device']}, {facts['dtype']}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    sign = "<=" if row.target.kind == "at most" else ">="
    verdict = "" if row.failure else (" met" if row.target.met(row.value) else " **missed**")
    return f"{sign} {_number(row.target.value)}{verdict}"


def _value(measure: Timing | float | str) -> float:
    assert not isinstance(measure, str)
    return measure.ms if isinstance(measure, Timing) else measure


def _measure(measure: Timing | float | str) -> str:
    if isinstance(measure, str):
        return measure
    return _number(_value(measure)) + ("*" if isinstance(measure, Timing) and measure.method == "events" else "")


def _number(value: float) -> str:
    """Three digits: 0.0752, 17.8, 54,517."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _plain(row: Row) -> dict[str, Any]:
    """The row for JSON: what a NaN would break is None."""
    plain = asdict(row) | {"passed": row.passed, "value": row.value if math.isfinite(row.value) else None}
    if row.target:
        plain["target_met"] = None if row.failure else row.target.met(row.value)
    for check in plain["checks"].values():
        check["error"] = check["error"] if math.isfinite(check["error"]) else None
    return plain


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
