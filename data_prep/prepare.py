"""`based prep`: corpus -> tokenizer -> shuffled, packed token blocks -> shards and a manifest, all or nothing."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from based_megatron.data.manifest import TOKENIZER_NAME, Manifest, make_manifest, save_manifest
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import Corpus, Document, Skips
from based_megatron.data_prep.output import SPLITS, resolved_output, workplace
from based_megatron.data_prep.shards import ShuffleBuffer, SplitWriter, TokenizedDocument
from based_megatron.data_prep.tokenizer import END_OF_TEXT, Encoder, load_tokenizer, train_tokenizer
from based_megatron.errors import DataError

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 22
MAX_BLOCK_TOKENS = 2**28
"""A block is in memory several times while it is written: some 4 GiB of uint32."""


def prepare(config: PrepConfig) -> Manifest:
    """Write the prepared corpus to config.output and return its manifest.

    Everything is written to a workplace next to the output (output.py), which gets the output's name when it is complete; a failure
    removes it. Raises DataError: no documents, no tokenizer, an output in the way or at work, a full disk.
    """
    _check(config)
    output = resolved_output(config.output)
    corpus = Corpus(config)
    try:
        with workplace(output, config.overwrite) as place:
            with _progress_bar() as progress:
                manifest = _write(config, corpus, place.corpus, progress)
            place.publish()
    except OSError as error:
        raise DataError(
            f"cannot write {output}: {error.strerror or error}; make room or change --output (nothing was kept)"
        ) from error
    return dataclasses.replace(manifest, folder=Path(config.output))


def is_validation(text: str, fraction: float) -> bool:
    """True if a document belongs to the validation split: its hash lies in the first `fraction` of the range."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2.0**64


def _check(config: PrepConfig) -> None:
    if not 0 <= config.validation_fraction < 1:
        raise DataError(f"--validation-fraction {config.validation_fraction} is not in [0, 1)")
    if config.max_skipped is not None and (config.max_skipped < 0 or (config.strict and config.max_skipped)):
        raise DataError(f"--max-skipped is {config.max_skipped}: set 0 or more, and with --strict nothing else than 0")
    for flag in ("shuffle_tokens", "block_tokens", "shard_blocks", "train_tokenizer_bytes"):
        if getattr(config, flag) < 1:
            raise DataError(f"--{flag.replace('_', '-')} is {getattr(config, flag)} but must be at least 1")
    if config.block_tokens > MAX_BLOCK_TOKENS:
        raise DataError(
            f"--block-tokens {config.block_tokens} is more than a block can have: set at most {MAX_BLOCK_TOKENS}"
        )


def _write(config: PrepConfig, corpus: Corpus, folder: Path, progress: Progress) -> Manifest:
    encoder = _tokenizer(config, corpus, progress)
    encoder.save(folder)
    skips = Skips(most=0 if config.strict else config.max_skipped)
    with contextlib.ExitStack() as shards:
        writers = {
            name: shards.enter_context(
                SplitWriter(folder, name, encoder.dtype, config.block_tokens, config.shard_blocks)
            )
            for name in SPLITS
        }
        _pack(config, corpus, skips, encoder, writers, progress)
        splits = {name: writer.close() for name, writer in writers.items()}
    _check_documents(config, {name: split.documents for name, split in splits.items()}, skips)
    manifest = make_manifest(
        tokenizer_xxh3=xxhash.xxh3_128_hexdigest((folder / TOKENIZER_NAME).read_bytes()),
        vocab_size=encoder.vocab_size,
        dtype=encoder.dtype.name,
        eos_id=encoder.eos_id,
        splits=splits,
        skipped=dict(sorted(skips.counts.items())),
        folder=folder,
    )
    save_manifest(manifest)
    return manifest


def _pack(
    config: PrepConfig,
    corpus: Corpus,
    skips: Skips,
    encoder: Encoder,
    writers: dict[str, SplitWriter],
    progress: Progress,
) -> None:
    """Tokenize all documents, and give each to the writer of its split, shuffled."""
    buffers = {name: ShuffleBuffer(config.shuffle_tokens, config.seed) for name in writers}
    total_tokens = 0
    task = progress.add_task("tokenize", total=corpus.total_bytes, tokens=0)
    for batch in _batches(corpus.documents(skips)):
        for source, tokens in zip(batch, encoder.encode([source.text for source in batch]), strict=True):
            split = "validation" if is_validation(source.text, config.validation_fraction) else "train"
            for document in buffers[split].add(TokenizedDocument(tokens, source.file, source.record)):
                writers[split].add(document)
            total_tokens += len(tokens)
        progress.update(task, completed=corpus.bytes_read, tokens=total_tokens)
    for split, buffer in buffers.items():
        for document in buffer.drain():
            writers[split].add(document)


def _tokenizer(config: PrepConfig, corpus: Corpus, progress: Progress) -> Encoder:
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer, config.eos_token)
    task = progress.add_task("train tokenizer", total=min(corpus.total_bytes, config.train_tokenizer_bytes), tokens=0)

    def texts() -> Iterator[str]:
        left_bytes = config.train_tokenizer_bytes
        for document in corpus.documents(Skips(quiet=True)):
            if not is_validation(document.text, config.validation_fraction):
                yield document.text
                left_bytes -= len(document.text.encode())
            progress.update(task, completed=config.train_tokenizer_bytes - left_bytes)
            if left_bytes <= 0:
                return

    encoder = train_tokenizer(texts(), config.vocab_size, config.eos_token or END_OF_TEXT)
    progress.remove_task(task)
    if encoder.vocab_size < config.vocab_size:
        logger.warning(
            "the text gave a tokenizer of only %d entries, not --vocab-size %d", encoder.vocab_size, config.vocab_size
        )
    return encoder


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_documents(config: PrepConfig, documents: dict[str, int], skips: Skips) -> None:
    if not sum(documents.values()):
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(skips.counts.items())) or "none"
        raise DataError(
            f"no documents in {', '.join(config.inputs) or 'the inputs'} (skipped: {skipped}); "
            f"check the inputs and --text-key"
        )
    if not documents["train"]:
        raise DataError(
            f"all {documents['validation']} documents fell into the validation split: lower --validation-fraction "
            f"{config.validation_fraction} or split the text into more documents with --separator"
        )
    if config.validation_fraction and not documents["validation"]:
        logger.warning(
            "none of the %d documents fell into the validation split: "
            "raise --validation-fraction %g or split the text with --separator",
            documents["train"],
            config.validation_fraction,
        )


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens, seconds = task.fields["tokens"], task.elapsed or 0
        return Text(f"{tokens / 1e6:.1f} Mtok, {tokens / seconds / 1e6:.2f} Mtok/s" if tokens and seconds else "")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), _TokensPerSecond(), TimeRemainingColumn()
    )
