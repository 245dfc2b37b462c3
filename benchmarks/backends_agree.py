"""Train twice from the same seed and data, with the reference and the Triton kernels, and compare the loss curves.

    python benchmarks/backends_agree.py DATA OUTPUT [--limit NATS] [any options of `based train`]

DATA is a folder written by `based prep`, with the tokenizer of the config (GPT-2's for the presets):

    python -m based_megatron.data_prep.stdlib_corpus stdlib.jsonl
    based prep stdlib.jsonl --output DATA --tokenizer path/to/gpt2 --validation-fraction 0.03

Writes OUTPUT/losses.json and prints a table in Markdown; exits with 1 if a step's losses differ by more than the limit.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from based_megatron.monitor.events import read_events

BACKENDS = ("reference", "triton")
DEFAULTS = {
    "config": "based-360m",
    "train.steps": "100",
    "train.global-batch-sequences": "8",
    "train.micro-batch-sequences": "8",
    "schedule.warmup-steps": "10",
    "validation.interval-steps": "0",
    "checkpoint.interval-steps": "0",
    "monitor.log-interval-steps": "1",
}
"""Every step is logged, none is validated; the rate is at its peak from step 10 on, where differences grow fastest."""


def main() -> int:
    """Both runs, the table, the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--limit", type=float, default=0.05, help="largest difference of a step's losses, in nats")
    arguments, own = parser.parse_known_args()
    options = dict(DEFAULTS)
    for name, value in zip(own[::2], own[1::2], strict=True):
        options[name.removeprefix("--").replace("_", "-")] = value
    losses = {backend: train(arguments.data, arguments.output / backend, backend, options) for backend in BACKENDS}
    differences = {
        step: abs(losses["triton"][step] - loss)
        for step, loss in losses["reference"].items()
        if step in losses["triton"]
    }
    (arguments.output / "losses.json").write_text(json.dumps({"options": options, "losses": losses}, indent=1) + "\n")
    print("| step | reference | triton | difference |\n|---|---|---|---|")
    for step in sorted({min(differences), *(s for s in differences if s % 10 == 0), max(differences)}):
        print(f"| {step} | {' | '.join(f'{losses[b][step]:.4f}' for b in BACKENDS)} | {differences[step]:.1e} |")
    worst = max(differences, key=differences.__getitem__)
    verdict = "agree" if differences[worst] <= arguments.limit else "DIFFER"
    print(
        f"\n{len(differences)} steps {verdict}: largest difference {differences[worst]:.2e} at step {worst} "
        f"(limit {arguments.limit}), mean {statistics.mean(differences.values()):.2e} nats"
    )
    return int(verdict == "DIFFER")


def train(data: Path, run_dir: Path, backend: str, options: dict[str, str]) -> dict[int, float]:
    """{step: loss} of a run of its own."""
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = {**options, "run-dir": str(run_dir), "data.path": str(data), "train.backend": backend}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    subprocess.run([sys.executable, "-m", "based_megatron", "train", *flags], check=True)
    return {e["step"]: e["loss"] for e in read_events(run_dir / "events.jsonl") if e["event"] == "step"}


if __name__ == "__main__":
    sys.exit(main())
