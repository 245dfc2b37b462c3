"""Recall over a run: its validations as JSON, and that JSON as a plot.

python -m benchmarks.recall_curves collect RUN_DIR benchmarks/results/h100-recall-probes.json
python -m benchmarks.recall_curves draw benchmarks/results/h100-recall-probes.json benchmarks/results/h100-recall-probes.svg
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from based_megatron.bench.pictures import svg_pyplot
from based_megatron.config import load_config
from based_megatron.monitor.events import read_events
from based_megatron.run_folder.files import CONFIG, EVENTS
from based_megatron.run_folder.history import read_history

COPIED = ("ar_ppl", "other_ppl", "ar_share", "rare_count", "by_count", "by_distance", "probes", "chance")
DIGITS = 6


def collect(run_dir: Path) -> dict[str, Any]:
    """What was run, and every validation of it."""
    config, events = load_config(str(run_dir / CONFIG)), list(read_events(run_dir / EVENTS))
    step_tokens = config.train.global_batch_sequences * config.data.sequence_length_tokens
    held_out = {event["step"]: event["loss"] for event in events if event["event"] == "validation"}
    last = [event for event in events if event["event"] == "step"][-1]
    start = read_history(run_dir)[-1]
    return {
        "facts": {
            "command": " ".join(["based", *start.command[1:]]),
            "versions": start.versions,
            "parameters": next(event["parameters"] for event in events if event["event"] == "start"),
            "step_tokens": step_tokens,
            "tokens_per_second": last.get("tokens_per_second"),
            "wall_seconds": {name: value for name, value in last.items() if name.startswith("wall_seconds/")},
        },
        "train": [[event["step"], event["loss"]] for event in events if event["event"] == "step"],
        "validations": [
            {
                "step": event["step"],
                "tokens": event["step"] * step_tokens,
                "loss": held_out[event["step"]],
                **{name: event[name] for name in COPIED},
            }
            for event in events
            if event["event"] == "recall"
        ],
    }


def draw(results: dict[str, Any], target: Path) -> None:
    """Four panels over training tokens: the two losses, gains by training count, losses by distance, and probes."""
    pyplot = svg_pyplot()
    found = results["validations"]
    tokens = [validation["tokens"] / 1e6 for validation in found]
    figure, ((losses, gains), (distances, probes)) = pyplot.subplots(2, 2, figsize=(9.5, 6.8), sharex=True)
    for name, label in (("ar_ppl", "AR hits"), ("other_ppl", "all other tokens")):
        losses.plot(tokens, [_log(validation[name]) for validation in found], label=label)
    losses.set(title="held-out loss", ylabel="nats")
    for count in found[0]["by_count"]:
        rows = [validation["by_count"][count] for validation in found]
        values = [_less(row["first"][0], row["repeat"][0]) for row in rows]
        gains.plot(tokens, values, label=f"bigram {count.replace('_up', '+')} times in training")
    gains.set(title="first occurrences minus repeats", ylabel="nats")
    for distance in found[0]["by_distance"]:
        values = [_number(validation["by_distance"][distance][0]) for validation in found]
        distances.plot(tokens, values, label=f"{distance.replace('_up', '+')} tokens back")
    distances.set(title="AR hits by distance", ylabel="nats", xlabel="million training tokens")
    for name, chance in found[0]["chance"].items():
        values = [_less(validation["probes"][name], chance) for validation in found]
        probes.plot(tokens, values, "--" if name.startswith("mqar") else "-", label=name)
    probes.axhline(0, color="grey", linewidth=0.8)
    probes.set(title="probes: loss minus that of a guess", ylabel="nats", xlabel="million training tokens")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _log(value: float | None) -> float:
    return math.nan if value is None else math.log(value)


def _less(one: float | None, other: float | None) -> float:
    return _number(one) - _number(other)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def main(action: str, source: Path, target: Path) -> None:
    """Collect a run's validations into JSON, or draw them."""
    if action == "collect":
        target.write_text(json.dumps(_rounded(collect(source)), indent=1) + "\n")
    else:
        draw(json.loads(source.read_text()), target)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
