"""Speed and memory of `based prep` against the tokenizer alone: `python -m benchmarks.prep --tokenizer path/to/gpt2 --megabytes 16 128`.

For each size, a corpus of that many megabytes of text is prepared by `--tasks` processes, and the same texts are encoded by
`encode_batch_fast` in as many processes that do nothing else, with one thread each. Times are of the clock and of the processor: on a
machine that others use too, only the second is a measurement.
"""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import tyro

from based_megatron.data_prep.stdlib_corpus import stdlib_documents

BATCH = 256


@dataclass(frozen=True)
class Options:
    """Measure `based prep`."""

    tokenizer: str
    """Tokenizer, as `based prep` takes it."""
    megabytes: tuple[int, ...] = (64,)
    """Sizes of the corpora, in millions of bytes of text."""
    tasks: int = 1
    """Processes."""
    text: tuple[str, ...] = ()
    """Text files; their paragraphs are added to the sources of Python's standard library."""


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    seconds: float
    processor_seconds: float
    tokens: int
    peak_bytes: int
    """Largest resident memory of one process."""


def documents(options: Options) -> Iterator[str]:
    """Texts without end; each time around they begin with another line."""
    texts = [document["text"] for document in stdlib_documents()]
    for path in options.text:
        texts += [part for part in Path(path).read_text().split("\n\n\n") if part.strip()]
    around = 0
    while True:
        for text in texts:
            yield f"{around}\n{text}" if around else text
        around += 1


def write_corpus(folder: Path, options: Options, megabytes: int) -> list[Path]:
    """Files of JSON lines, one a task, with so much text together."""
    paths = [folder / f"part{i}.jsonl" for i in range(options.tasks)]
    texts = documents(options)
    for path in paths:
        left_bytes = megabytes * 10**6 // options.tasks
        with path.open("w") as file:
            while left_bytes > 0:
                text = next(texts)
                left_bytes -= len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
    return paths


def encode_alone(path: str, tokenizer: str) -> int:
    """Tokens of a file's texts, which are in memory; seconds of reading and of loading are not counted."""
    from based_megatron.data_prep.tokenizer import load_tokenizer

    encoder = load_tokenizer(tokenizer)
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    before, used = time.monotonic(), time.process_time()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        batch = encoder.tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(map(len, batch)) + len(batch)
    print(json.dumps([time.monotonic() - before, time.process_time() - used, tokens]))
    return tokens


def measure_alone(paths: list[Path], options: Options) -> Cost:
    """`encode_batch_fast` on every file, a process each."""
    code = "import sys; from benchmarks.prep import encode_alone; encode_alone(*sys.argv[1:])"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), options.tokenizer], env=environment, stdout=subprocess.PIPE
        )
        for path in paths
    ]
    found = [json.loads(process.communicate()[0]) for process in processes]
    seconds, processor_seconds, tokens = zip(*found, strict=True)
    return Cost(max(seconds), sum(processor_seconds), sum(tokens), 0)


def prep(paths: list[str], output: str, options: Options, send: Connection) -> None:
    """Prepare the corpus in this process and its tasks, and send what it took."""
    from based_megatron.data_prep.config import PrepConfig
    from based_megatron.data_prep.prepare import prepare

    before = time.monotonic()
    config = PrepConfig(tuple(paths), output, options.tokenizer, tasks=options.tasks, keep_units=False)
    manifest = prepare(config)
    seconds = time.monotonic() - before
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    used = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    tokens = sum(split.tokens for split in manifest.splits.values())
    send.send(Cost(seconds, used, tokens, max(usage.ru_maxrss for usage in usages) * 1024))


def measure_prep(paths: list[Path], output: Path, options: Options) -> Cost:
    """`based prep` on the files, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe()
    process = context.Process(target=prep, args=([str(path) for path in paths], str(output), options, send))
    process.start()
    cost: Cost = receive.recv()
    process.join()
    return cost


def main() -> None:
    """Print a row for each size."""
    options = tyro.cli(Options)
    print(
        "| text, MB | tasks | load | tokens/s, prep | tokens/s of a core, prep | of a core, encoding alone | share | peak MB a task |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = write_corpus(folder, options, megabytes)
            load = os.getloadavg()[0]
            alone = measure_alone(paths, options)
            whole = measure_prep(paths, folder / "out", options)
        a_core, alone_a_core = whole.tokens / whole.processor_seconds, alone.tokens / alone.processor_seconds
        print(
            f"| {megabytes} | {options.tasks} | {load:.1f} | {whole.tokens / whole.seconds / 1e6:.2f} M | {a_core / 1e6:.2f} M | "
            f"{alone_a_core / 1e6:.2f} M | {a_core / alone_a_core:.0%} | {whole.peak_bytes / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
