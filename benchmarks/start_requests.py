"""What a start of many ranks asks of a shared file system, and of the network for it: counted, not estimated.

    python -m benchmarks.start_requests                    8, 64 and 512 ranks; two minutes on a CPU, needs no GPU
    python -m benchmarks.start_requests --ranks 4 16

Each simulated rank is a thread that runs the host's side of a start as `based train` does, on real files: acceptance, the lock, the
identity of the run, the search for the newest checkpoint and its hashes, the load of its fragment, the record, and the first batch. The
checkpoint has a file for each rank. Collectives of the host are in-process, and their pickled objects are measured. Not simulated are
devices, process groups, and DCP's own exchange of plans (one gather and one scatter of a rank's list of reads).

Prints a table in Markdown: totals over all ranks. Nothing may grow faster than their number.
"""

import argparse
import contextlib
import dataclasses
import os
import pickle
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from based_megatron.checkpoint import writer
from based_megatron.checkpoint.fragments import Fragment
from based_megatron.checkpoint.load import load_checkpoint
from based_megatron.checkpoint.ranks import ALONE, Ranks, result_of, without_dcp_warning
from based_megatron.checkpoint.save import save_checkpoint
from based_megatron.checkpoint.store import FOLDER, newest_valid
from based_megatron.config import Config, parse_config, to_dict
from based_megatron.config.limits import absolute_paths
from based_megatron.data.loader import Loader
from based_megatron.data.sources import Sources
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.parallel.sharding import ShardSpec
from based_megatron.train.accept import accept
from based_megatron.train.identity import identify, is_done, locked_folder, record_start

T = TypeVar("T")
SHAPES = {"embedding.weight": (4096, 64), "layers.0.mlp.fc1.weight": (1024, 64), "final_norm.weight": (1024,)}
KINDS = ("model", "exp_avg", "exp_avg_sq")
STEP, NODE_RANKS = 10, 8


class Meeting:
    """Where the ranks of a simulation wait for each other, and what they have exchanged."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.collectives, self.received_bytes, self.largest_bytes = 0, 0, 0

    def note(self, received_bytes: int, receivers: int) -> None:
        self.collectives += 1
        self.received_bytes += received_bytes * receivers
        self.largest_bytes = max(self.largest_bytes, received_bytes)


@dataclasses.dataclass(frozen=True)
class SimulatedRanks(Ranks):
    """Ranks as threads of one process."""

    meeting: Meeting | None = None

    def together(self, action: Callable[[], T]) -> list[T]:
        assert self.meeting
        slots, barrier = self.meeting.slots, self.meeting.barrier
        slots[self.rank] = self._try(action)
        if barrier.wait() == 0:
            self.meeting.note(sum(len(pickle.dumps(slot)) for slot in slots), self.size)
        outcomes = list(slots)
        barrier.wait()
        return [result_of(outcome) for outcome in outcomes]

    def on_first(self, action: Callable[[], T]) -> T:
        assert self.meeting
        slots, barrier = self.meeting.slots, self.meeting.barrier
        if self.rank == 0:
            slots[0] = self._try(action)
            self.meeting.note(len(pickle.dumps(slots[0])), self.size - 1)
        barrier.wait()
        outcome = slots[0]
        barrier.wait()
        return result_of(outcome)

    def lowest(self, value: int) -> int:
        return min(self.together(lambda: value))


class Watch:
    """Counts what this process does below a folder: files opened to read, by kind, looks at names, and who writes."""

    def __init__(self, root: Path) -> None:
        self._root, self._on = str(root), False
        self.reads, self.looks = Counter[str](), 0
        self.writers: dict[str, set[str]] = {}
        self._stat = os.stat
        sys.addaudithook(self._see)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count, until the end of the block."""

        def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            self.looks += isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._root)
            return self._stat(path, *args, **kwargs)

        before, self._on, os.stat = _read_bytes(), True, stat  # type: ignore[assignment]
        try:
            yield
        finally:
            self._on, os.stat = False, self._stat
            self.read_bytes = _read_bytes() - before

    def _see(self, event: str, arguments: tuple) -> None:
        if not self._on or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = arguments[0]
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self._root):
            return
        name = os.path.relpath(path, self._root)
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.writers.setdefault(_kind(name), set()).add(threading.current_thread().name)
        else:
            self.reads["folders listed" if event != "open" else _kind(name)] += 1


def _kind(name: str) -> str:
    """A class of files: tensors and shards are many, all others have their names."""
    if name.endswith(".distcp"):
        return "tensors of the checkpoint"
    # What is written whole has another name before: `.NAME.new` with more behind it, or `.NAME.PID.new`.
    return (
        "shards of the corpus" if name.endswith(".tar") else re.sub(r"^\.(.*?)(\.\d+)?\.new.*", r"\1", Path(name).name)
    )


def _read_bytes() -> int:
    """Bytes that this process has read so far, from caches too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def fragments_of(rank: int, size: int) -> list[Fragment]:
    """What a rank holds under ZeRO: its part of each flat parameter, and of Adam's moments."""
    found = []
    for name, shape in SHAPES.items():
        start, stop = (prod(shape) * r // size for r in (rank, rank + 1))
        tensors = {kind: torch.full((stop - start,), float(rank)) for kind in KINDS}
        found.append(Fragment(ShardSpec(name, shape, None, (), 0, 1), start, stop - start, tensors))
    return found


def prepared(folder: Path, size: int) -> Config:
    """A run that has saved a step on so many ranks, each into a file of its own."""
    text = folder / "text.txt"
    text.write_text("\n".join(f"{i} and {i * i % 97} are numbers" for i in range(400 + 40 * size)))
    prepare(PrepConfig(inputs=(str(text),), output=str(folder / "data"), vocab_size=300, validation_fraction=0.05))
    config = absolute_paths(
        parse_config([
            *["--config", "tiny", "--run-dir", str(folder / "run"), "--data.path", str(folder / "data")],
            *["--model.vocab-size", "300", "--data.sequence-length-tokens", "16", "--data.num-workers", "0"],
            *["--train.micro-batch-sequences", "1", "--train.global-batch-sequences", str(size)],
            *["--validation.interval-steps", "0", "--monitor.no-tensorboard"],
        ])
    )  # fmt: skip
    everything = [fragment for rank in range(size) for fragment in fragments_of(rank, size)]
    state = {
        "config": to_dict(config),
        "data_fingerprint": Sources(config.data, size).fingerprint,
        "optimizer": {"name": "adamw"},
        "tokens_seen": 0,
    }
    threads, parts = writer.WRITER_THREADS, writer._parts

    def part_of_each_rank(items: Sequence[Any]) -> list[tuple[int, list[Any]]]:
        return [
            (number, list(part))
            for number, part in enumerate(np.array_split(np.array(items, dtype=object), size))
            if len(part)
        ]

    try:
        writer.WRITER_THREADS, writer._parts = size, part_of_each_rank
        save_checkpoint(folder / "run" / FOLDER, STEP, everything, state, Ranks())
    finally:
        writer.WRITER_THREADS, writer._parts = threads, parts
    return config


def start(config: Config, ranks: SimulatedRanks) -> None:
    """The host's side of a start on one rank, to the first batch."""
    run_dir = Path(config.run_dir)
    sources = accept(config, ranks.size, ranks.rank)
    with locked_folder(config, ranks):
        identity = ranks.on_first(lambda: identify(config, sources.fingerprint))
        assert not is_done(config, identity, ranks)
        path = newest_valid(run_dir / FOLDER, lambda line: None, ranks)
        assert path is not None
        fragments = fragments_of(ranks.rank, ranks.size)
        load_checkpoint(path, fragments, ranks=ranks)
        assert all(bool((fragment.tensors["model"] == ranks.rank).all()) for fragment in fragments)
        hosts = ranks.together(lambda: f"node{ranks.rank // NODE_RANKS}")
        record_start(config, identity, STEP, ranks, hosts)
        rows = config.train.global_batch_sequences
        Loader(sources, config.data, rows, 1, ranks.rank, ranks.size).micro_batches(STEP)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the ranks of a start have asked for, all together."""

    ranks: int
    opened: dict[str, int]
    """Files opened to read, by kind, and folders listed."""
    looks: int
    """Names that were looked at."""
    read_bytes: int
    writers: dict[str, int]
    """Ranks that wrote, by kind of file."""
    collectives: int
    received_bytes: int
    """Objects, over all ranks."""
    largest_bytes: int
    """The most that a rank receives in one collective."""
    checkpoint_bytes: int


def simulate(size: int) -> Counts:
    """A start of so many ranks, from a checkpoint."""
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        folder = Path(name)
        config, watch, meeting = prepared(folder, size), Watch(folder), Meeting(size)
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                start(config, SimulatedRanks(rank, size, None, meeting))
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
        # Filters of warnings belong to the process: a thread that ends its own would give those of before back to all others.
        with watch.watching(), without_dcp_warning(ALONE):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        files = (folder / "run" / FOLDER).rglob("*.distcp")
        return Counts(
            size, dict(watch.reads), watch.looks, watch.read_bytes,
            {kind: len(names) for kind, names in watch.writers.items()},
            meeting.collectives, meeting.received_bytes, meeting.largest_bytes,
            sum(path.stat().st_size for path in files),
        )  # fmt: skip


def rows_of(counts: Counts) -> dict[str, float]:
    """The numbers of a start by name."""
    opened = {f"opened: {kind}": number for kind, number in sorted(counts.opened.items())}
    written = {f"ranks that write: {kind}": number for kind, number in sorted(counts.writers.items())}
    return {
        **opened, "names looked at": counts.looks, "bytes read": counts.read_bytes,
        "of them beyond twice the checkpoint, a rank": (counts.read_bytes - 2 * counts.checkpoint_bytes) // counts.ranks,
        **written, "collectives of the host": counts.collectives,
        "largest object that a rank receives, bytes": counts.largest_bytes,
        "objects received by one rank, bytes": counts.received_bytes // counts.ranks,
    }  # fmt: skip


def table(found: Sequence[Counts]) -> list[str]:
    """Lines of Markdown."""
    rows = [rows_of(counts) for counts in found]
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = f"| all ranks together | {' | '.join(f'{counts.ranks} ranks' for counts in found)} |"
    lines = [f"| {name} | {' | '.join(f'{row.get(name, 0):,}' for row in rows)} |" for name in names]
    return [head, "|---|" + "---|" * len(found), *lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    found = []
    for size in parser.parse_args(argv).ranks:
        began = time.perf_counter()
        found.append(simulate(size))
        print(f"{size} ranks simulated in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
