"""Every architecture of about 360 M parameters, trained for some steps on the same tokens: losses, tokens per second and memory.

    python -m benchmarks.baselines_360m run --data DATA --output benchmarks/results/h100-baselines-360m.json       one GPU
    python -m benchmarks.baselines_360m render benchmarks/results/h100-baselines-360m.json                         the table next to it

Each is one `based train` job on the first of the corpus, which ends after its steps or its seconds, whichever come first. Losses of so few
steps show that a model learns, not how good it is.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from based_megatron.bench.table import table_line
from based_megatron.monitor.events import each_step, read_events
from based_megatron.run_folder.files import EVENTS
from based_megatron.run_folder.history import versions

PRESETS = ("based-360m", "transformer-360m", "mamba-360m", "retnet-360m", "rwkv-360m", "hyena-360m")
RECOMPUTED = ("retnet-360m", "rwkv-360m", "hyena-360m")
"""Models whose mixers are plain PyTorch: what they save of 16 sequences is more than a GPU of 80 GB has."""
SHOWN_EVERY_STEPS = 50
WARMUP_STEPS = 10
"""Steps at the start whose times do not count: kernels are compiled in them."""


def arguments_of(preset: str, data: str, run_dir: Path, steps: int, sequences: int) -> list[str]:
    """What follows `based`: the schedule is that of the preset, without a stop for validations and checkpoints."""
    settings = {
        "data.path": data,
        "run-dir": run_dir,
        "train.steps": steps,
        "train.micro-batch-sequences": sequences,
        "train.global-batch-sequences": sequences,
        "train.recompute": "mixer" if preset in RECOMPUTED else "none",
        "validation.interval-steps": 0,
        "checkpoint.interval-steps": 0,
        "monitor.log-interval-steps": WARMUP_STEPS,
        "monitor.sample-interval-steps": 0,
    }
    given = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["train", "--config", preset, *given, "--checkpoint.no-asynchronous", "--monitor.no-tensorboard"]


def train(preset: str, data: str, steps: int, sequences: int, seconds: float) -> dict[str, Any]:
    """One row: what the events of the job say."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / preset
        command = arguments_of(preset, data, run_dir, steps, sequences)
        job = subprocess.Popen([sys.executable, "-m", "based_megatron", *command], stdout=subprocess.DEVNULL)
        try:
            code: int | None = job.wait(seconds)
        except subprocess.TimeoutExpired:
            job.kill()
            code = None
            job.wait()
        if code or not (run_dir / EVENTS).exists():
            return {"preset": preset, "failed": f"the job ended with status {code}"}
        return row_of(preset, run_dir, sequences)


def row_of(preset: str, run_dir: Path, sequences: int) -> dict[str, Any]:
    """The row of a run folder; rates are medians of the log lines after the first."""
    events = list(read_events(run_dir / EVENTS))
    lines = [event for event in events if event["event"] == "step"][1:]
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    losses |= {step: loss for step, (loss, _) in each_step(events).items()}
    return {
        "preset": preset,
        "parameters": next(event["parameters"] for event in events if event["event"] == "start"),
        "sequences": sequences,
        "recompute": "mixer" if preset in RECOMPUTED else "none",
        "steps": max(losses, default=0),
        "tokens_per_second": median(line["tokens_per_second"] for line in lines) if lines else None,
        "peak_gib": max((line.get("memory/peak_gib", 0.0) for line in lines), default=None),
        "losses": {step: loss for step, loss in losses.items() if step == 1 or step % SHOWN_EVERY_STEPS == 0},
    }


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: a row for each architecture, with the loss of each step that all of them show."""
    done = [row for row in rows if "failed" not in row]
    steps = sorted({int(step) for row in done for step in row["losses"]})
    names = ["model", "parameters", "tokens/s", "peak GiB", *(f"loss at {step}" for step in steps)]
    lines = [table_line(*names), "|---" * len(names) + "|", *(table_line(*cells(row, steps)) for row in rows)]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any], steps: Sequence[int]) -> list[str]:
    """One line of the table."""
    if "failed" in row:
        return [row["preset"], row["failed"], *[""] * (2 + len(steps))]
    losses = {int(step): f"{loss:.3f}" for step, loss in row["losses"].items()}
    rate, peak = row["tokens_per_second"] or 0, row["peak_gib"] or 0
    numbers = [f"{row['parameters'] / 1e6:.0f} M", f"{rate:,.0f}", f"{peak:.1f}"]
    return [row["preset"], *numbers, *(losses.get(step, "") for step in steps)]


def main(argv: Sequence[str]) -> None:
    """Train and write the JSON, or write the table of a JSON file next to it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines_360m", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--data", required=True, help="a prepared corpus")
    run.add_argument("--output", required=True, type=Path, help="the JSON file, written after each model")
    run.add_argument("--presets", nargs="+", default=PRESETS)
    run.add_argument("--steps", type=int, default=200)
    run.add_argument("--sequences", type=int, default=16, help="of each step, in one micro batch")
    run.add_argument("--seconds", type=float, default=600.0, help="limit of each model")
    commands.add_parser("render").add_argument("path", type=Path)
    chosen = parser.parse_args(argv)
    if chosen.command == "render":
        chosen.path.with_suffix(".md").write_text(to_markdown(json.loads(chosen.path.read_text())["rows"]))
        return
    rows: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results = {"device": device, "versions": versions(), "rows": rows}
    for preset in chosen.presets:
        rows.append(train(preset, chosen.data, chosen.steps, chosen.sequences, chosen.seconds))
        print(json.dumps(rows[-1]), flush=True)
        chosen.output.write_text(json.dumps(results, indent=1) + "\n")
    print(to_markdown(rows), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
