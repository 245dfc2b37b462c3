"""What a save costs: how long training stands still, and how much slower it is while the rest is written.

    python -m benchmarks.saves --config based-1b --output runs/saves             one GPU, with 40 GB of disk and 16 GB of host memory
    torchrun --nproc-per-node 2 -m benchmarks.saves --config based-1b ...        several
    python -m benchmarks.saves --config tiny --output runs/saves                 a CPU

Trains on random tokens with the trainer and its checkpointer: some steps without a save, a save that training waits for, and one in the
background, with steps until it is written. Then the checkpoint is verified and restored. Prints a table in Markdown and writes it with all
digits as JSON; the checkpoints are removed.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from based_megatron.config import Config, load_config
from based_megatron.data.batch import MicroBatch
from based_megatron.model.build import build_model
from based_megatron.monitor.flops import parameter_count
from based_megatron.monitor.hub import build_metrics
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.sequence.slices import even_bounds
from based_megatron.parallel.topology import Topology, build_topology, join, leave, pick_device
from based_megatron.train.callbacks.base import Callback, StepReport
from based_megatron.train.callbacks.checkpointer import Checkpointer
from based_megatron.train.guard import Guard
from based_megatron.train.optimizer import build_engine
from based_megatron.train.step import Step, build_step
from based_megatron.train.trainer import Trainer

GB = 1e9
WARMUP_STEPS = 3


class RandomBatches:
    """One micro batch of random tokens, again in each step."""

    def __init__(self, config: Config, topology: Topology) -> None:
        generator = torch.Generator().manual_seed(topology.rank)
        length = config.data.sequence_length_tokens
        shape = (config.train.micro_batch_sequences, length + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self._batches = [MicroBatch(inputs, labels, torch.ones(inputs.shape), None, even_bounds(length, 1))]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        return self._batches

    def documents(self, step: int) -> list[str]:
        return []


class Times(Callback):
    """Seconds of each step, of what the callbacks between two of these did after it, and the events of saves."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.moments: list[float] = []
        self.saves: list[dict[str, Any]] = []

    def post_step(self, trainer: Trainer, report: StepReport) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    def on_event(self, trainer: Trainer, name: str, fields: dict) -> None:
        if name == "warning":
            print(fields["message"], flush=True)
        if name == "checkpoint":
            self.saves.append(fields)


class SavesAtIntervals(Checkpointer):
    """A checkpointer without a save at the end, which waits at the start for the memory that it takes in the background."""

    memory_seconds = 0.0

    def on_start(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        super().on_start(trainer)
        if self._saver._allocation is not None:
            self._saver._allocation.result()
        self.memory_seconds = time.perf_counter() - started

    def on_end(self, trainer: Trainer) -> None:
        if self._saver.in_flight:
            self._finish(trainer)


class StopWhen:
    """Ends a run after so many steps, and not while a save is in flight."""

    def __init__(self, steps: int, checkpointer: SavesAtIntervals | None) -> None:
        self._left, self._checkpointer = steps + 1, checkpointer  # asked before each step

    def forget_last(self) -> None:
        """No file to remove."""

    def honoured(self) -> None:
        """Nor one to remove at the end."""

    def agreed(self, failure: str = "") -> str:
        """A reason, if it is time."""
        self._left -= 1
        waits = self._checkpointer is not None and self._checkpointer._saver.in_flight
        return "" if self._left > 0 or waits else "enough"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some steps, with or without a save after the last but some of them."""

    step_seconds: list[float]
    """Each step alone, device included."""
    after_seconds: list[float]
    """How long the checkpointer took after each of them."""
    saves: list[dict[str, Any]]


def run_phase(
    config: Config, topology: Topology, step: Step, first: int, steps: int, checkpointer: SavesAtIntervals | None
) -> Phase:
    """Train from step `first` on."""
    before, after = Times(topology.device), Times(topology.device)
    callbacks = [before, *([checkpointer] if checkpointer else []), after]
    trainer = Trainer(
        config,
        topology,
        step,
        RandomBatches(config, topology),
        build_metrics(topology),
        callbacks,
        StopWhen(steps, checkpointer),  # type: ignore[arg-type]
        Guard(config, topology.device),
        lambda latest_step: None,
        (first, 0),
    )
    trainer.fit()
    ends = list(zip(before.moments, after.moments, strict=True))
    return Phase(
        [later[0] - earlier[1] for earlier, later in pairwise(ends)],
        [end - begin for begin, end in ends],
        after.saves,
    )


def measure(config: Config, topology: Topology, steps: int) -> dict[str, Any]:
    """All numbers of this rank."""
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)
    step = build_step(chunks, engine, topology, config.parallel.zero_stage)

    def checkpointer(asynchronous: bool) -> SavesAtIntervals:
        settings = dataclasses.replace(config.checkpoint, asynchronous=asynchronous)
        changed, guard = dataclasses.replace(config, checkpoint=settings), Guard(config, topology.device)
        return SavesAtIntervals(engine, changed, "benchmark", "random tokens", guard, topology.device)

    interval = config.checkpoint.interval_steps
    plain = run_phase(config, topology, step, 0, WARMUP_STEPS + steps, None)
    step_seconds = median(plain.step_seconds[WARMUP_STEPS:])
    # The save is after the step whose number is a multiple of the interval: the second of each phase.
    waited = run_phase(config, topology, step, interval - 2, 2, checkpointer(asynchronous=False))
    in_background = checkpointer(asynchronous=True)
    behind = run_phase(config, topology, step, 2 * interval - 2, steps, in_background)
    (synchronous,), (asynchronous,) = waited.saves, behind.saves
    # step_seconds has no entry for the first step: the one after the save is the second entry.
    writing, elapsed = [], 0.0
    for seconds in behind.step_seconds[1:]:
        if elapsed < asynchronous["write_seconds"]:
            writing.append(seconds)
        elapsed += seconds
    restoring = time.perf_counter()
    restored = checkpointer(asynchronous=False).restore()
    restore_seconds = time.perf_counter() - restoring
    assert restored[0] == 2 * interval, restored
    path = Path(asynchronous["path"])
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "step_seconds": step_seconds,
        "synchronous": {"stands_still_seconds": waited.after_seconds[-1], **seconds_of(synchronous)},
        "asynchronous": {"stands_still_seconds": behind.after_seconds[1], **seconds_of(asynchronous)},
        "memory_seconds": in_background.memory_seconds,
        "first_step_after_seconds": behind.step_seconds[1],
        "steps_while_writing": len(writing),
        "step_seconds_while_writing": sum(writing) / len(writing),
        "lost_while_writing_seconds": sum(writing) - len(writing) * step_seconds,
        "restore_seconds": restore_seconds,
        "all_step_seconds": {"plain": plain.step_seconds, "asynchronous": behind.step_seconds},
    }


def seconds_of(save: dict[str, Any]) -> dict[str, Any]:
    """What the event of a save says, without where it is."""
    return {key: value for key, value in save.items() if key != "path"}


def config_of(name: str, micro_batch: int, run_dir: Path, ranks: int) -> Config:
    """A preset that saves every 1,000 steps and keeps one checkpoint."""
    config = load_config(name)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        data=dataclasses.replace(config.data, path="unused", isolate_documents=False),
        train=dataclasses.replace(
            config.train,
            steps=1_000_000,
            micro_batch_sequences=micro_batch or config.train.micro_batch_sequences,
            global_batch_sequences=(micro_batch or config.train.micro_batch_sequences) * ranks,
            max_skipped_steps=1_000_000,
        ),
        checkpoint=dataclasses.replace(config.checkpoint, interval_steps=1000, keep_last=1, keep_every_steps=0),
        monitor=dataclasses.replace(config.monitor, log_interval_steps=1_000_000),
    )


def lines_of(row: dict[str, Any]) -> list[str]:
    """The table."""
    still = {key: row[key]["stands_still_seconds"] for key in ("synchronous", "asynchronous")}
    slower = row["step_seconds_while_writing"] / row["step_seconds"] - 1
    facts = [
        ("parameters", f"{row['parameters'] / 1e9:.3f} G"),
        ("checkpoint", f"{row['checkpoint_bytes'] / GB:.2f} GB"),
        ("a step without a save", f"{row['step_seconds']:.3f} s"),
        ("host memory for the copy, taken at the start in the background", f"{row['memory_seconds']:.1f} s"),
        ("training stands still, synchronous save", f"{still['synchronous']:.2f} s"),
        ("training stands still, asynchronous save", f"{still['asynchronous']:.3f} s"),
        ("the first step after it", f"{row['first_step_after_seconds']:.3f} s"),
        ("written in the background in", f"{row['asynchronous']['write_seconds']:.1f} s"),
        ("a step meanwhile", f"{row['step_seconds_while_writing']:.3f} s ({100 * slower:+.1f} %)"),
        ("lost in all these steps", f"{row['lost_while_writing_seconds']:.2f} s of {row['steps_while_writing']} steps"),
        ("verified and restored in", f"{row['restore_seconds']:.1f} s"),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)]


def main(argv: Sequence[str] | None = None) -> int:
    """One preset on as many ranks as there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="based-1b")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences; that of the preset if not given")
    parser.add_argument("--steps", type=int, default=10, help="steps without a save, and at least so many with one")
    arguments = parser.parse_args(argv)
    rank = rank_from_environment()
    device = pick_device("auto", rank.local_rank)
    join(rank, device, timeout_seconds=600)
    run_dir = arguments.output / "run"
    config = config_of(arguments.config, arguments.micro_batch, run_dir, rank.world_size)
    row = {
        "config": arguments.config,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "ranks": rank.world_size,
        "torch": torch.__version__,
        "micro_batch": config.train.micro_batch_sequences,
        "tokens": config.data.sequence_length_tokens,
        "parameters": parameter_count(config.model),
        **measure(config, build_topology(config.parallel, device), arguments.steps),
    }
    if rank.rank == 0:
        shutil.rmtree(run_dir)
        lines = lines_of(row)
        print("\n".join(lines), flush=True)
        stem = arguments.output / f"saves-{rank.world_size}"
        head = [f"- {key}: {row[key]}" for key in ("config", "device", "ranks", "micro_batch", "tokens")]
        stem.with_suffix(".md").write_text("\n".join([*head, "", *lines, ""]))
        stem.with_suffix(".json").write_text(json.dumps(row, indent=1, default=str) + "\n")
    leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
