"""Train from the same seed and data with the reference and the Triton kernels, and compare the loss curves with a control.

    python -m benchmarks.backends_agree DATA OUTPUT [--limit RATIO] [--together] [any options of `based train`]

DATA is a folder written by `based prep`, with the tokenizer of the config (GPT-2's for the presets):

    python -m based_megatron.data_prep.stdlib_corpus stdlib.jsonl
    based prep stdlib.jsonl --output DATA --tokenizer path/to/gpt2 --validation-fraction 0.03

Two runs in bf16 drift apart by themselves. How far is shown by the controls, which take the sequences of a step in half as large
micro batches: the same maths, other roundings. The run in fp32 is what all others should stay near.

Writes OUTPUT/losses.json and prints tables in Markdown; exits with 1 if triton is further from reference, on average, than
RATIO times the control is.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from based_megatron.monitor.events import read_events

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
"""Every step is logged, none is validated; the learning rate is at its peak from step 10 on, where differences grow fastest."""
RUNS = ("fp32", "reference", "reference, control", "triton", "triton, control")
PAIRS = (
    ("reference", "reference, control"),
    ("triton", "triton, control"),
    ("reference", "triton"),
    ("reference, control", "triton, control"),
    *(("fp32", name) for name in RUNS[1:]),
)
LAST_STEPS = 20


def main() -> int:
    """All runs, the tables, the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--limit", type=float, default=1.5, help="largest ratio of the mean differences")
    parser.add_argument("--together", action="store_true", help="train all at once: they must fit on the device")
    arguments, own = parser.parse_known_args()
    options = dict(DEFAULTS)
    for name, value in zip(own[::2], own[1::2], strict=True):
        options[name.removeprefix("--").replace("_", "-")] = value
    running = {}
    for name in RUNS:
        running[name] = start(arguments.data, run_dir(arguments.output, name), {**options, **changes(name, options)})
        if not arguments.together:
            running[name].wait()
    failed = [name for name, process in running.items() if process.wait() != 0]
    if failed:
        logs = "; ".join(str(run_dir(arguments.output, name).with_suffix(".log")) for name in failed)
        print(f"backends_agree: runs failed, see {logs}", file=sys.stderr)
        return 1
    losses = {name: read_losses(run_dir(arguments.output, name)) for name in RUNS}
    (arguments.output / "losses.json").write_text(json.dumps({"options": options, "losses": losses}, indent=1) + "\n")
    print(curves(losses), differences(losses), sep="\n\n")
    control, other = (mean_difference(losses, *pair) for pair in (PAIRS[0], PAIRS[2]))
    verdict = "agree" if other <= arguments.limit * control else "DIFFER"
    print(
        f"\nThe backends {verdict}: {other / control:.2f} times the control's mean difference (limit {arguments.limit})"
    )
    return int(verdict == "DIFFER")


def changes(name: str, options: dict[str, str]) -> dict[str, str]:
    """Options of one run that the others do not share."""
    changed = {"train.backend": "triton" if name.startswith("triton") else "reference"}
    if name == "fp32":
        changed["train.precision"] = "fp32"
    if name.endswith("control"):
        changed["train.micro-batch-sequences"] = str(int(options["train.micro-batch-sequences"]) // 2)
    return changed


def run_dir(output: Path, name: str) -> Path:
    """The folder that a run writes to."""
    return output / name.replace(", ", "-")


def start(data: Path, folder: Path, options: dict[str, str]) -> subprocess.Popen[bytes]:
    """Begin a run; what it prints goes to a file next to its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {**options, "run-dir": str(folder), "data.path": str(data)}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    with folder.with_suffix(".log").open("wb") as log:
        command = [sys.executable, "-m", "based_megatron", "train", *flags]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def read_losses(folder: Path) -> dict[int, float]:
    """Losses of a run by step."""
    return {e["step"]: e["loss"] for e in read_events(folder / "events.jsonl") if e["event"] == "step"}


def curves(losses: dict[str, dict[int, float]]) -> str:
    """A table of every tenth step."""
    steps = losses["fp32"]
    lines = [f"| step | {' | '.join(RUNS)} |", "|---" * (1 + len(RUNS)) + "|"]
    for step in sorted({min(steps), *(s for s in steps if s % 10 == 0), max(steps)}):
        lines.append(f"| {step} | {' | '.join(f'{losses[name][step]:.4f}' for name in RUNS)} |")
    return "\n".join(lines)


def differences(losses: dict[str, dict[int, float]]) -> str:
    """A table of how far pairs of runs drift apart."""
    lines = [f"| pair | mean | largest | at step | second less first, last {LAST_STEPS} |", "|---|---|---|---|---|"]
    for first, second in PAIRS:
        parted = {step: losses[second][step] - loss for step, loss in losses[first].items()}
        worst = max(parted, key=lambda step: abs(parted[step]))
        shift = statistics.mean(parted[step] for step in sorted(parted)[-LAST_STEPS:])
        mean = mean_difference(losses, first, second)
        lines.append(f"| {first}; {second} | {mean:.1e} | {abs(parted[worst]):.1e} | {worst} | {shift:+.1e} |")
    return "\n".join(lines)


def mean_difference(losses: dict[str, dict[int, float]], first: str, second: str) -> float:
    """Mean absolute difference over all steps, in nats."""
    return statistics.mean(abs(losses[second][step] - loss) for step, loss in losses[first].items())


if __name__ == "__main__":
    sys.exit(main())
