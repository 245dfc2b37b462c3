"""Tokens a second that one thread of the loader makes batches of, from local disk.

    python -m benchmarks.loader_rates                  four corpora of 64 M tokens in a temporary folder, some minutes

Each number is the best of REPEATS; the loader reads in the calling thread, and PyTorch has one thread. CPU seconds count, as the
machine may do other work; wall time is the second number. Prints a table in Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import make_manifest, save_manifest
from based_megatron.data.sources import Sources
from based_megatron.data_prep.shards import SplitWriter, TokenizedDocument

CORPORA, DOCUMENT_TOKENS, BLOCK_TOKENS = 4, 1000, 1 << 22
BATCH_TOKENS, SECONDS, REPEATS = 1 << 19, 2.0, 3
LENGTHS = (2048, 8192, 32768)


def write_corpus(folder: Path, tokens: int, seed: int) -> None:
    """Random documents of about DOCUMENT_TOKENS, in blocks and shards as `based prep` writes them."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    random, splits = np.random.default_rng(seed), {}
    for name, count in (("train", tokens), ("validation", 0)):
        with SplitWriter(folder, name, np.dtype("<u2"), BLOCK_TOKENS, 64) as writer:
            for record in range(count // DOCUMENT_TOKENS):
                ids = random.integers(1, 50_000, random.integers(1, 2 * DOCUMENT_TOKENS), np.uint16)
                writer.add(TokenizedDocument(np.append(ids, np.uint16(0)), "made.txt", record))
            splits[name] = writer.close()
    head = {"tokenizer_xxh3": xxhash.xxh3_128_hexdigest(b"{}"), "vocab_size": 50_257, "dtype": "uint16", "eos_id": 0}
    save_manifest(make_manifest(splits=splits, skipped={}, folder=folder, **head))


def rate(data: DataConfig) -> tuple[float, float]:
    """Millions of tokens a second of the CPU, and of the clock."""
    sequences = BATCH_TOKENS // data.sequence_length_tokens
    loader = Loader(Sources(data), data, sequences, sequences)
    found, step = [], 0
    for _ in range(REPEATS + 1):
        began, began_cpu, first = time.perf_counter(), time.process_time(), step
        while time.process_time() - began_cpu < SECONDS:
            loader.micro_batches(step)
            step += 1
        tokens = (step - first) * BATCH_TOKENS / 1e6
        found.append((tokens / (time.process_time() - began_cpu), tokens / (time.perf_counter() - began)))
    loader.close()
    # The first pass has opened the blocks.
    return max(found[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the corpora, and read them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000, help="of each corpus")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        paths = [Path(name) / f"corpus-{number}" for number in range(CORPORA)]
        for number, path in enumerate(paths):
            write_corpus(path, options.tokens, number)
        print(
            "M tokens/s of the CPU (of the clock)\n\n| tokens a sequence | one corpus | four, mixed | mixed / one |\n|---|---|---|---|"
        )
        for length in LENGTHS:
            one, mixed = (
                rate(
                    DataConfig(
                        sources=tuple(SourceConfig(str(path)) for path in paths[:count]),
                        sequence_length_tokens=length,
                        num_workers=0,
                    )
                )
                for count in (1, CORPORA)
            )
            cells = [f"{cpu:.0f} ({clock:.0f})" for cpu, clock in (one, mixed)]
            print(f"| {length:,} | {' | '.join(cells)} | {mixed[0] / one[0]:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
