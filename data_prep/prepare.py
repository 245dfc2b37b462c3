"""`based prep`: corpus -> tokenizer -> shuffled, packed token blocks -> shards and a manifest, all or nothing."""

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from based_megatron.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, make_manifest, save_manifest
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.corpus import Corpus, Document, Skips
from based_megatron.data_prep.shards import ShuffleBuffer, SplitWriter, TokenizedDocument
from based_megatron.data_prep.tokenizer import Encoder, load_tokenizer, train_tokenizer
from based_megatron.errors import DataError

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 22
SPLITS = ("train", "validation")


def prepare(config: PrepConfig) -> Manifest:
    """Write the prepared corpus to config.output and return its manifest.

    Everything is written to `<output>.tmp`, which takes the output's name when it is complete; a failure removes it.
    Raises DataError: no documents, no tokenizer, an output in the way, a full disk.
    """
    _check(config)
    output = Path(config.output)
    temporary = output.with_name(output.name + ".tmp")
    _check_free(output, temporary, config.overwrite)
    corpus = Corpus(config)
    try:
        temporary.mkdir(parents=True)
        try:
            with _progress_bar() as progress:
                manifest = _write(config, corpus, temporary, progress)
            _publish(temporary, output)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise DataError(
            f"cannot write {output}: {error.strerror or error}; make room or change --output (nothing was kept)"
        ) from error
    return dataclasses.replace(manifest, folder=output)


def is_validation(text: str, fraction: float) -> bool:
    """True if a document belongs to the validation split: its hash lies in the first `fraction` of the range."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2.0**64


def _check(config: PrepConfig) -> None:
    if not 0 <= config.validation_fraction < 1:
        raise DataError(f"--validation-fraction {config.validation_fraction} is not in [0, 1)")
    for flag in ("shuffle_tokens", "block_tokens", "shard_blocks", "train_tokenizer_bytes"):
        if getattr(config, flag) < 1:
            raise DataError(f"--{flag.replace('_', '-')} is {getattr(config, flag)} but must be at least 1")


def _check_free(output: Path, temporary: Path, overwrite: bool) -> None:
    if temporary.exists():
        if not overwrite:
            raise DataError(
                f"{temporary} is in the way, of a `based prep` that runs or was killed: remove it or add --overwrite"
            )
        shutil.rmtree(temporary)
    if output.exists():
        prepared = (output / MANIFEST_NAME).is_file()
        if prepared and not overwrite:
            raise DataError(
                f"{output} already holds a prepared corpus: change --output, or add --overwrite to replace it"
            )
        if not prepared and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"{output} exists and is not a prepared corpus: change --output")


def _write(config: PrepConfig, corpus: Corpus, folder: Path, progress: Progress) -> Manifest:
    encoder = _tokenizer(config, corpus, progress)
    encoder.save(folder)
    skips = Skips()
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

    encoder = train_tokenizer(texts(), config.vocab_size)
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


def _publish(temporary: Path, output: Path) -> None:
    """Give the complete folder its name, in the place of an older one if there is one."""
    for folder in (*(temporary / split for split in SPLITS), temporary):
        _fsync_folder(folder)
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    _fsync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens, seconds = task.fields["tokens"], task.elapsed or 0
        return Text(f"{tokens / 1e6:.1f} Mtok, {tokens / seconds / 1e6:.2f} Mtok/s" if tokens and seconds else "")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), _TokensPerSecond(), TimeRemainingColumn()
    )
