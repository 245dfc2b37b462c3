"""The start of a rank on a corpus of 15 TB: seconds and memory until the sequences of its first step are known.

    python -m benchmarks.large_manifest                       4 million blocks in 62,500 shards; needs 0.5 GB of disk
    python -m benchmarks.large_manifest --blocks 100000

The manifest is a real one, its shards are files without content. Each line is a process of its own: a rank of 512, which looks at its
share of the shards, and a process alone, which looks at all of them. Memory is the most that the process had, beyond what it had after
its imports. Prints a table in Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from based_megatron.config.schema import DataConfig
from based_megatron.data.manifest import Split, check_tokenizer_file, make_manifest, save_manifest
from based_megatron.data.members import Members, row_type
from based_megatron.data.sources import Sources

BLOCK_TOKENS, SHARD_BLOCKS = 1 << 21, 64
SAMPLE_BYTES = 2 * BLOCK_TOKENS + (1 << 17)
LENGTH_TOKENS, BATCH_SEQUENCES = 2048, 2048
RANKS = ("3/512", "0/1")


def write_corpus(folder: Path, blocks: int) -> None:
    """A manifest of so many blocks of uint16, and shards of the right lengths."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    manifest = make_manifest(
        tokenizer_xxh3=xxhash.xxh3_128_hexdigest(b"{}"),
        vocab_size=50257,
        dtype="uint16",
        eos_id=0,
        splits={
            name: _split(folder, name, count) for name, count in (("train", blocks), ("validation", -(-blocks // 200)))
        },
        skipped={},
        folder=folder,
    )
    save_manifest(manifest)


def _split(folder: Path, name: str, blocks: int) -> Split:
    numbers = np.arange(blocks, dtype=np.uint64)
    table = np.zeros(blocks, row_type(8))
    table["file"] = numbers // SHARD_BLOCKS
    table["key"] = [f"{number:08d}".encode() for number in range(blocks)]
    table["begin"] = numbers % SHARD_BLOCKS * SAMPLE_BYTES
    table["end"] = table["begin"] + SAMPLE_BYTES
    table["tokens"], table["docs"] = BLOCK_TOKENS, 2000
    table["first_document"] = numbers * 2000
    table["hashes_xxh3"] = np.random.default_rng(0).integers(1, 1 << 63, blocks)
    files = [f"{name}/shard-{number:05d}.tar" for number in range(-(-blocks // SHARD_BLOCKS))]
    for file in files:
        with (folder / file).open("wb") as stream:
            stream.truncate(SHARD_BLOCKS * SAMPLE_BYTES)
    return Split(2000 * blocks, blocks * BLOCK_TOKENS, Members(files, table))


def start(folder: Path, rank: str) -> dict[str, float]:
    """What the start of a rank costs, in this process."""
    number, of_ranks = map(int, rank.split("/"))
    before, began, began_cpu = _most_bytes(), time.perf_counter(), time.process_time()
    data = DataConfig(path=str(folder), sequence_length_tokens=LENGTH_TOKENS)
    sources = Sources(data, BATCH_SEQUENCES, (number, of_ranks))
    check_tokenizer_file(sources.manifests[0])
    sources.validation_sequences(1000)
    chosen = sources.locate(np.arange(BATCH_SEQUENCES, dtype=np.int64))
    assert len({sources.train[source].pieces(sequence)[0] for source, sequence in chosen}) == BATCH_SEQUENCES
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": _most_bytes() - before, "before": before}


def _most_bytes() -> int:
    """The most memory that this process had; what getrusage says includes that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the corpus, and start on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4_000_000)
    parser.add_argument("--start", nargs=2, metavar=("FOLDER", "RANK/RANKS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.start:
        print(json.dumps(start(Path(options.start[0]), options.start[1])))
        return 0
    with tempfile.TemporaryDirectory(prefix="manifest-") as name:
        folder = Path(name) / "corpus"
        write_corpus(folder, options.blocks)
        files = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        tokens = options.blocks * BLOCK_TOKENS
        print(f"{options.blocks:,} blocks, {tokens / 1e12:.1f} T tokens, manifest and tables {files / 1e6:.0f} MB\n")
        print("| rank | start, s | of them CPU, s | memory, MB | before, MB |\n|---|---|---|---|---|")
        for rank in RANKS:
            command = [sys.executable, "-m", "benchmarks.large_manifest", "--start", str(folder), rank]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            seconds, memory = (found["seconds"], found["cpu_seconds"]), (found["bytes"], found["before"])
            cells = [rank, *(f"{value:.2f}" for value in seconds), *(f"{value / 1e6:.0f}" for value in memory)]
            print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
